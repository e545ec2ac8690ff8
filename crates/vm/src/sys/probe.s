# The probe guest. Position-independent, long mode; ring 3 for all work, ring 0 for interrupts and faults only.
#
# Every vCPU has a block of 16 KiB, aligned to its size (offsets in payload.rs): mailbox page, ring-0 stack, ring-3 stack,
# kvmclock page. r15 points at the block for ever. The host writes arguments, then the sequence number, then rings; the guest
# answers by writing results, then `done` = sequence number, and says WAIT on the doorbell's port.
#
# Between commands the guest keeps nothing in registers but r15, so a child can be given its first command while its vCPU
# still has the parent's registers.

.pushsection .rodata.farfork_probe, "a"
.balign 16
.globl farfork_probe_start
farfork_probe_start:

# ---------------------------------------------------------------------------------------------------- ring 3: the main loop
.globl farfork_probe_entry
farfork_probe_entry:
9:  mov rax, [r15 + {MB_SEQ}]
    cmp rax, [r15 + {MB_DONE}]
    jne 7f
    mov eax, {EVENT_WAIT}
    mov edx, {PORT}
    out dx, eax
    jmp 9b
7:  mov r14, rax
    xor r10d, r10d
    xor r11d, r11d
    xor r12d, r12d
    xor r13d, r13d
    mov rax, [r15 + {MB_OP}]
    mov rdi, [r15 + {MB_ARG0}]
    mov rsi, [r15 + {MB_ARG0} + 8]
    mov rdx, [r15 + {MB_ARG0} + 16]
    mov rcx, [r15 + {MB_ARG0} + 24]
    mov r8,  [r15 + {MB_ARG0} + 32]
    mov r9,  [r15 + {MB_ARG0} + 40]
    cmp rax, {OP_COUNT}
    jae 2f
    lea rbx, [rip + probe_ops]
    movsxd rax, dword ptr [rbx + rax * 4]
    add rax, rbx
    call rax
2:  mov [r15 + {MB_RESULT0}], r10
    mov [r15 + {MB_RESULT0} + 8], r11
    mov [r15 + {MB_RESULT0} + 16], r12
    mov [r15 + {MB_RESULT0} + 24], r13
    mov [r15 + {MB_DONE}], r14
    jmp 9b

.balign 4
probe_ops:
    .long op_ping - probe_ops
    .long op_who - probe_ops
    .long op_fill - probe_ops
    .long op_verify - probe_ops
    .long op_touch - probe_ops
    .long op_checksum - probe_ops
    .long op_spin - probe_ops
    .long op_fault - probe_ops
    .long op_epochs - probe_ops
    .long op_hold - probe_ops
    .long op_ticks_start - probe_ops
    .long op_ticks_wait - probe_ops
    .long op_clock - probe_ops
    .long op_print - probe_ops

# ping() -> ticks
op_ping:
    mov r10, [r15 + {MB_TICKS}]
    ret

# who() -> identity low, identity high, vCPU, ticks
op_who:
    mov eax, {IDENTITY_PAGE}
    mov r10, [rax]
    mov r11, [rax + 8]
    mov r12, [r15 + {MB_VCPU}]
    mov r13, [r15 + {MB_TICKS}]
    ret

# The pattern: word i of a page is mix(page * PATTERN_PAGE + epoch * PATTERN_EPOCH + (i + 1) * PATTERN_STEP).
# Start of a page's pattern: r8 page, rdx epoch -> rax. Clobbers rbx.
pattern_start:
    mov rax, {PATTERN_PAGE}
    imul rax, r8
    mov rbx, {PATTERN_EPOCH}
    imul rbx, rdx
    add rax, rbx
    ret

.macro pattern_word       # rax state -> rbx word; r9 step, rcx multiplier; clobbers rbp
    add rax, r9
    mov rbx, rax
    shr rbx, 32
    xor rbx, rax
    imul rbx, rcx
    mov rbp, rbx
    shr rbp, 29
    xor rbx, rbp
.endm

# fill(first page, pages, epoch) -> pages filled
op_fill:
    mov r8, rdi
    mov r9, {PATTERN_STEP}
    mov rcx, {PATTERN_MIX}
7:  test rsi, rsi
    jz 3f
    call pattern_start
    mov rdi, r8
    shl rdi, 12
    mov r11d, 512
2:  pattern_word
    mov [rdi], rbx
    add rdi, 8
    dec r11d
    jnz 2b
    inc r8
    inc r10
    dec rsi
    jmp 7b
3:  ret

# verify(first page, pages, epoch) -> pages that differ, the first of them (or -1), pages compared
op_verify:
    mov r8, rdi
    mov r9, {PATTERN_STEP}
    mov rcx, {PATTERN_MIX}
    mov r11, -1
7:  test rsi, rsi
    jz 5f
    call pattern_start
    mov rdi, r8
    shl rdi, 12
    mov r13d, 512
2:  pattern_word
    cmp [rdi], rbx
    jne 3f
    add rdi, 8
    dec r13d
    jnz 2b
    jmp 4f
3:  inc r10
    cmp r11, -1
    jne 4f
    mov r11, r8
4:  inc r8
    inc r12
    dec rsi
    jmp 7b
5:  xor r13d, r13d
    ret

# touch(first page, pages, stride in pages, flags: 1 write, 2 shuffled, value or seed, span = power of two >= pages)
#   -> sum of the bytes read, pages touched.  A write stores `value` in the page's first word.
op_touch:
    test ecx, 2
    jnz 3f
    shl rdi, 12
    shl rdx, 12
7:  test rsi, rsi
    jz 9f
    test ecx, 1
    jnz 2f
    movzx eax, byte ptr [rdi]
    add r10, rax
    jmp 4f
2:  mov [rdi], r8
4:  inc r11
    add rdi, rdx
    dec rsi
    jmp 7b
# Shuffled: a full-period congruential sequence over the span, skipping what is not below `pages`.
3:  mov r12, r9
    dec r12
    mov rbp, r8
    and rbp, r12
    mov rbx, r8
    or rbx, 1
5:  test r9, r9
    jz 9f
    dec r9
    mov rax, 0x5851F42D4C957F2D
    imul rbp, rax
    add rbp, rbx
    and rbp, r12
    cmp rbp, rsi
    jae 5b
    mov rax, rbp
    imul rax, rdx
    add rax, rdi
    shl rax, 12
    inc r11
    test ecx, 1
    jnz 6f
    movzx eax, byte ptr [rax]
    add r10, rax
    jmp 5b
6:  mov [rax], r8
    jmp 5b
9:  xor r12d, r12d
    ret

# checksum(first page, pages) -> h, where h starts as CHECKSUM_START and h = rol((h ^ word) * PATTERN_MIX, 23) for each word
op_checksum:
    mov r10, {CHECKSUM_START}
    mov rcx, {PATTERN_MIX}
    shl rdi, 12
    shl rsi, 9
7:  test rsi, rsi
    jz 2f
    xor r10, [rdi]
    imul r10, rcx
    rol r10, 23
    add rdi, 8
    dec rsi
    jmp 7b
2:  ret

# spin(rounds, or 0 for "until told to stop") -> rounds, TSC ticks that passed
op_spin:
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov r11, rax
7:  inc r10
    cmp qword ptr [r15 + {MB_STOP}], 0
    jne 2f
    cmp r10, rdi
    jne 7b
2:  rdtsc
    shl rdx, 32
    or rax, rdx
    sub rax, r11
    mov r11, rax
    ret

# fault(kind, address, value): 0 undefined instruction, 1 division by zero, 2 read address -> value, 3 write address,
#   4 privileged instruction, 5 triple fault (address = IDT)
op_fault:
    cmp rdi, 1
    jb 7f
    je 2f
    cmp rdi, 3
    jb 3f
    je 4f
    cmp rdi, 5
    jb 5f
    mov rdi, rsi
    mov ecx, 512
    xor eax, eax
    cld
    rep stosq
7:  ud2
2:  xor ecx, ecx
    mov eax, 1
    xor edx, edx
    div ecx
    ret
3:  mov r10, [rsi]
    ret
4:  mov [rsi], rdx
    ret
5:  hlt
    ret

# epochs(first page, pages) -> last epoch. Until told to stop (it looks after each page): epoch += 1, then its number into
# each page, first page first.
# At every instant: word(page 0) >= word(page 1) >= ... >= word(page 0) - 1.
op_epochs:
    shl rdi, 12
    mov r10, [rdi]
7:  inc r10
    mov rax, rdi
    mov rcx, rsi
2:  mov [rax], r10
    cmp qword ptr [r15 + {MB_STOP}], 0
    jne 3f
    add rax, 4096
    dec rcx
    jnz 2b
    jmp 7b
3:  ret

# hold(vector width in bytes: 16 or 32) -> registers that changed. Loads the general registers and sixteen vector registers
# from MB_BUFFER (which the host has filled), says `held`, spins until told to stop, then compares every one of them.
op_hold:
    mov r12, rdi
    cmp r12, 32
    jne 7f
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu ymm\n, [r15 + {MB_BUFFER} + 32 * \n]
    .endr
    jmp 2f
7:  .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movdqu xmm\n, [r15 + {MB_BUFFER} + 32 * \n]
    .endr
2:  mov rax, [r15 + {MB_BUFFER}]
    mov rbx, [r15 + {MB_BUFFER} + 8]
    mov rcx, [r15 + {MB_BUFFER} + 16]
    mov rdx, [r15 + {MB_BUFFER} + 24]
    mov rsi, [r15 + {MB_BUFFER} + 32]
    mov rdi, [r15 + {MB_BUFFER} + 40]
    mov rbp, [r15 + {MB_BUFFER} + 48]
    mov r8,  [r15 + {MB_BUFFER} + 56]
    mov r9,  [r15 + {MB_BUFFER} + 64]
    mov r10, [r15 + {MB_BUFFER} + 72]
    mov r11, [r15 + {MB_BUFFER} + 80]
    mov r13, [r15 + {MB_BUFFER} + 88]
    mov qword ptr [r15 + {MB_HELD}], 1
3:  pause
    cmp qword ptr [r15 + {MB_STOP}], 0
    je 3b
    mov qword ptr [r15 + {MB_SCRATCH}], 0
    .macro compare reg, offset
    cmp \reg, [r15 + {MB_BUFFER} + \offset]
    je 8f
    inc qword ptr [r15 + {MB_SCRATCH}]
8:
    .endm
    compare rax, 0
    compare rbx, 8
    compare rcx, 16
    compare rdx, 24
    compare rsi, 32
    compare rdi, 40
    compare rbp, 48
    compare r8, 56
    compare r9, 64
    compare r10, 72
    compare r11, 80
    compare r13, 88
    sub rsp, 32
    cmp r12, 32
    jne 5f
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu [rsp], ymm\n
    lea rsi, [r15 + {MB_BUFFER} + 32 * \n]
    mov ecx, 4
    call compare_stack
    .endr
    vzeroupper
    jmp 6f
5:  .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movdqu [rsp], xmm\n
    lea rsi, [r15 + {MB_BUFFER} + 32 * \n]
    mov ecx, 2
    call compare_stack
    .endr
6:  add rsp, 32
    mov qword ptr [r15 + {MB_HELD}], 0
    mov r10, [r15 + {MB_SCRATCH}]
    xor r11d, r11d
    xor r12d, r12d
    xor r13d, r13d
    ret

# rcx words at the caller's [rsp] against [rsi]; a difference counts once.
compare_stack:
    lea rdi, [rsp + 8]
7:  mov rax, [rdi]
    cmp rax, [rsi]
    jne 2f
    add rdi, 8
    add rsi, 8
    dec ecx
    jnz 7b
    ret
2:  inc qword ptr [r15 + {MB_SCRATCH}]
    ret

# ticks_start(initial count, divide register, LVT entry): programs the local APIC's timer; count 0 stops it.
op_ticks_start:
    mov eax, {LAPIC}
    mov [rax + 0x3E0], esi
    mov [rax + 0x320], edx
    mov [rax + 0x380], edi
    ret

# ticks_wait(n) -> ticks before, ticks after: comes back when n more have been counted, or when told to stop.
op_ticks_wait:
    mov r10, [r15 + {MB_TICKS}]
7:  pause
    cmp qword ptr [r15 + {MB_STOP}], 0
    jne 2f
    mov r11, [r15 + {MB_TICKS}]
    mov rax, r11
    sub rax, r10
    cmp rax, rdi
    jb 7b
2:  mov r11, [r15 + {MB_TICKS}]
    ret

# clock() -> TSC, kvmclock nanoseconds, kvmclock version
op_clock:
    lea rsi, [r15 + {KVMCLOCK}]
7:  mov r12d, [rsi]
    test r12d, 1
    jnz 7b
    lfence
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov r10, rax
    sub rax, [rsi + 8]
    mov r9, [rsi + 16]
    mov edi, [rsi + 24]
    movsx ecx, byte ptr [rsi + 28]
    cmp r12d, [rsi]
    jne 7b
    test ecx, ecx
    js 2f
    shl rax, cl
    jmp 3f
2:  neg ecx
    shr rax, cl
3:  mul rdi
    shrd rax, rdx, 32
    add rax, r9
    mov r11, rax
    ret

# print(bytes): MB_BUFFER to the first serial port
op_print:
    mov edx, 0x3F8
    lea rsi, [r15 + {MB_BUFFER}]
7:  test rdi, rdi
    jz 2f
    mov al, [rsi]
    out dx, al
    inc rsi
    inc r10
    dec rdi
    jmp 7b
2:  ret

# ------------------------------------------------------------------------------------ ring 0: interrupts, faults
# The stack of ring 0 lies in the vCPU's block, so rounding rsp down gives the block.
.macro count_interrupt counter
    push rax
    mov rax, rsp
    and rax, -{BLOCK_SIZE}
    inc qword ptr [rax + \counter]
    mov eax, {LAPIC}
    mov dword ptr [rax + 0xB0], 0
    pop rax
    iretq
.endm

.balign 16
.globl farfork_probe_timer
farfork_probe_timer:
    count_interrupt {MB_TICKS}

.balign 16
.globl farfork_probe_message
farfork_probe_message:
    count_interrupt {MB_MESSAGES}

# One stub of 16 bytes for each exception: a zero where the CPU pushes no error code, then the vector.
.balign 16
.globl farfork_probe_exceptions
farfork_probe_exceptions:
.set vector, 0
.rept 32
    .balign 16
    .if (vector != 8) && (vector != 10) && (vector != 11) && (vector != 12) && (vector != 13) && (vector != 14) && (vector != 17) && (vector != 21)
    push 0
    .endif
    push vector
    jmp exception
    .set vector, vector + 1
.endr

exception:
    mov rax, rsp
    and rax, -{BLOCK_SIZE}
    pop rcx
    mov [rax + {MB_FAULT}], rcx
    pop rcx
    mov [rax + {MB_FAULT} + 8], rcx
    pop rcx
    mov [rax + {MB_FAULT} + 16], rcx
    mov rcx, cr2
    mov [rax + {MB_FAULT} + 24], rcx
    mov edx, {PORT}
    mov eax, {EVENT_FAULT}
    out dx, eax
7:  mov eax, {EVENT_WAIT}
    out dx, eax
    jmp 7b

.globl farfork_probe_end
farfork_probe_end:
.popsection
