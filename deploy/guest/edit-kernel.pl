#!/usr/bin/perl
# Edits a Linux 6.1 source tree so that its kernel also runs where KVM emulates ring 0 (docs/guests.md says which hosts do).
# On other hosts the edited places are never reached, or do the same: one kernel serves both.
#
# usage: edit-kernel.pl SOURCE_DIRECTORY
#
# Each edit names one place, which must be there exactly once: a source that has moved on is refused, and nothing is written.
use strict;
use warnings;

my $tree = shift or die "usage: edit-kernel.pl SOURCE_DIRECTORY\n";

my @edits = (
    {
        # There SYSCALL arrives at its entry point while still in ring 3, which the kernel sees as a page fault of user code at
        # that very address. RCX and R11 hold what the instruction saved.
        file => 'arch/x86/mm/fault.c',
        at   => qr/^\tirqentry_state_t state;\n\n(?=\tprefetchw\(&current->mm->mmap_lock\);)/m,
        with => "\tirqentry_state_t state;\n\n"
              . "\tif (user_mode(regs) && address == regs->ip &&\n"
              . "\t    address == (unsigned long)entry_SYSCALL_64) {\n"
              . "\t\tint call = (int)regs->ax;\n\n"
              . "\t\tregs->orig_ax = (unsigned int)call;\n"
              . "\t\tregs->ax = -ENOSYS;\n"
              . "\t\tregs->ip = regs->cx;\n"
              . "\t\tregs->flags = regs->r11 | X86_EFLAGS_IF;\n"
              . "\t\tdo_syscall_64(regs, call);\n"
              . "\t\treturn;\n"
              . "\t}\n\n",
    },
    {
        file => 'arch/x86/mm/fault.c',
        at   => qr/^#include <asm\/vdso\.h>[^\n]*\n/m,
        with => "#include <asm/vdso.h>\n#include <asm/proto.h>\n#include <asm/syscall.h>\n",
    },
    {
        # INT3 is not emulated. Nothing uses it once jump labels are left out.
        file => 'arch/x86/kernel/alternative.c',
        at   => qr/^\tint3_selftest\(\);\n/m,
        with => "\tif (0)\n\t\tint3_selftest();\n",
    },
    {
        # FWAIT is not emulated. It raises a pending x87 exception early; the next x87 instruction raises it as well.
        file => 'arch/x86/kernel/fpu/core.c',
        at   => qr/asm volatile\("1: fwait\\n"/,
        with => 'asm volatile("1: nop\n"',
    },
);

my %text;
for my $edit (@edits) {
    my $path = "$tree/$edit->{file}";
    if (!exists $text{$path}) {
        open my $in, '<', $path or die "edit-kernel: $path: $!: is $tree a kernel source tree?\n";
        local $/;
        $text{$path} = <$in>;
    }
    my $found = () = $text{$path} =~ /$edit->{at}/g;
    $found == 1
        or die "edit-kernel: $edit->{file} has its place $found times where once is due: "
             . "this source is not the Linux 6.1 that the edits were written for\n";
    $text{$path} =~ s/$edit->{at}/$edit->{with}/;
}
for my $path (sort keys %text) {
    open my $out, '>', $path or die "edit-kernel: $path: $!\n";
    print {$out} $text{$path} or die "edit-kernel: $path: $!\n";
    close $out or die "edit-kernel: $path: $!\n";
}
