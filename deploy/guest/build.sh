#!/bin/sh
# Builds what Linux guests are made of, each part keyed by a hash of all that goes into it and kept in a cache, so that a second
# call takes a second. Prints the directory that holds the parts under their plain names:
#   vmlinux, bzImage   the kernel                       initrd       the agent, as /init
#   base.ext4          busybox                          python.ext4  busybox and Debian's python3
# usage: build.sh [PART...]      parts: kernel agent base python (default: all)
#        build.sh file-system TREE FILE MIB    an ext4 image of a tree, which is used up
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cache=${FARFORK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/farfork}/guest
export LC_ALL=C TZ=UTC
mkdir -p "$cache/current"

say() { echo "guest: $*" >&2; }

need() { # need COMMAND DEBIAN_PACKAGE...
    command=$1
    shift
    command -v "$command" >/dev/null 2>&1 || install "$@"
}

install() {
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "error: this is no Debian: guests are built from its packages; bring your own kernel and image instead (docs/guests.md)" >&2
        exit 1
    fi
    say "installing $*"
    sudo=
    [ "$(id -u)" -eq 0 ] || sudo=sudo
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

version() { # version PACKAGE: as apt would download it
    found=$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')
    case $found in
    '' | '(none)')
        apt-get update -qq >/dev/null 2>&1 || true
        found=$(apt-cache policy "$1" | sed -n 's/^  Candidate: //p')
        ;;
    esac
    echo "$1=$found"
}

key() { sha256sum | cut -c1-16; } # of standard input

# Makes a part in a directory of its own, which gets its name when all of it is there.
# usage: part NAME KEY FUNCTION FILE...
part() {
    name=$1 made=$cache/$1-$2 function=$3
    shift 3
    if [ ! -d "$made" ]; then
        work=$(mktemp -d "$cache/.$name.XXXXXX")
        # shellcheck disable=SC2064
        trap "rm -rf '$work'" EXIT
        trap 'exit 1' INT TERM
        "$function" "$work"
        chmod 755 "$work"
        mv -T "$work" "$made" 2>/dev/null || rm -rf "$work" # somebody else was faster
        trap - EXIT
    fi
    for file in "$@"; do
        ln -sfn "$made/$file" "$cache/current/.$file.$$"
        mv -fT "$cache/current/.$file.$$" "$cache/current/$file"
    done
}

kernel_packages='flex bison bc libelf-dev make gcc libc6-dev perl xz-utils kmod'
make_kernel() {
    # shellcheck disable=SC2086
    need flex $kernel_packages
    # shellcheck disable=SC2086
    [ -e /usr/include/libelf.h ] || install $kernel_packages
    [ -e /usr/src/linux-source-6.1.tar.xz ] || install linux-source-6.1
    "$here/kernel.sh" /usr/src/linux-source-6.1.tar.xz "$1/vmlinux" >&2
}

make_agent() {
    need cpio cpio
    say "agent: building"
    # Static: it runs in whatever root file system there is.
    RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static -C strip=symbols' \
        cargo build --quiet --manifest-path "$root/Cargo.toml" --profile guest --target x86_64-unknown-linux-gnu \
        --package farfork-agent --features guest --bin farfork-agent --target-dir "${CARGO_TARGET_DIR:-$root/target}/for-guest" >&2
    mkdir "$1/tree"
    cp "${CARGO_TARGET_DIR:-$root/target}/for-guest/x86_64-unknown-linux-gnu/guest/farfork-agent" "$1/tree/init"
    chmod 755 "$1/tree/init"
    find "$1/tree" -exec touch -h -d @0 {} +
    (cd "$1/tree" && find . -mindepth 1 | sort | cpio --quiet --create --format=newc --owner=+0:+0 --reproducible) >"$1/initrd"
    rm -r "$1/tree"
}

# A Debian package's files, without its scripts. usage: unpack DIRECTORY PACKAGE...
unpack() {
    into=$1
    shift
    debs=$(mktemp -d)
    (cd "$debs" && apt-get download -qq "$@" >/dev/null 2>&1) || {
        apt-get update -qq >/dev/null
        (cd "$debs" && apt-get download -qq "$@" >&2)
    }
    for deb in "$debs"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar --extract --directory "$into" --keep-directory-symlink --no-same-owner
    done
    rm -r "$debs"
}

# The same directories and files for both. usage: skeleton DIRECTORY
skeleton() {
    for directory in bin sbin lib lib64; do
        mkdir -p "$1/usr/$directory"
        ln -s "usr/$directory" "$1/$directory"
    done
    mkdir -p "$1/dev" "$1/proc" "$1/sys" "$1/run" "$1/tmp" "$1/root" "$1/etc/farfork/fork.d" "$1/var/log" "$1/var/tmp"
    unpack "$1" busybox-static
    for applet in $("$1/usr/bin/busybox" --list); do
        [ -e "$1/usr/bin/$applet" ] || ln -s busybox "$1/usr/bin/$applet"
    done
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' >"$1/etc/passwd"
    printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >"$1/etc/group"
    printf '127.0.0.1 localhost\n' >"$1/etc/hosts"
    printf 'guest\n' >"$1/etc/hostname"
    : >"$1/etc/machine-id"
    printf 'PRETTY_NAME="farfork guest"\nID=farfork\n' >"$1/etc/os-release"
}

# An ext4 image of a tree, the same to the bit for everybody: mke2fs -d would take times, and the order of directories, from the tree's
# own file system. So each file is written by debugfs, by name. usage: file_system TREE FILE MIB
file_system() {
    need mke2fs e2fsprogs
    E2FSPROGS_FAKE_TIME=1 mke2fs -q -t ext4 -L farfork -b 4096 -m 0 \
        -O '^has_journal,^resize_inode,^metadata_csum' -U 00000000-0000-4000-8000-000000000001 \
        -E 'hash_seed=00000000-0000-4000-8000-000000000002,root_owner=0:0,lazy_itable_init=1,nodiscard' "$2" "$3M" >/dev/null
    find "$1" -mindepth 1 -printf '%P\t%y\t%m\t%l\n' | LC_ALL=C sort | awk -F '\t' -v tree="$1" '
        function set(field, value) { printf "set_inode_field \"/%s\" %s %s\n", $1, field, value }
        $2 == "d" { printf "mkdir \"/%s\"\n", $1; set("mode", "04" substr("0000" $3, length($3) + 1)) }
        $2 == "f" { printf "write \"%s/%s\" \"/%s\"\n", tree, $1, $1; set("mode", "010" substr("0000" $3, length($3) + 1)) }
        $2 == "l" { printf "symlink \"/%s\" \"%s\"\n", $1, $4 }
        $2 !~ /^[dfl]$/ { print "error: " $1 " is no file, directory or link" >"/dev/stderr"; exit 1 }
        { set("uid", 0); set("gid", 0) }
        { n = split("atime ctime mtime crtime", times, " "); for (i = 1; i <= n; i++) set(times[i], "@1") }
    ' >"$2.commands"
    # It says nothing of what went wrong but in words.
    E2FSPROGS_FAKE_TIME=1 debugfs -w -f "$2.commands" "$2" >"$2.said" 2>&1
    if grep -v -E '^(debugfs|Allocated inode)' "$2.said" >&2; then
        echo "error: the file system $2 was not written as it should be" >&2
        exit 1
    fi
    e2fsck -fn "$2" >/dev/null 2>&1 || { echo "error: the file system $2 is not whole" >&2; exit 1; }
    rm -rf "$1" "$2.commands" "$2.said"
}

make_base() {
    say "base: unpacking busybox"
    mkdir "$1/tree"
    skeleton "$1/tree"
    file_system "$1/tree" "$1/base.ext4" 64
}

# python3 and what it loads; names as in Debian 12.
python_packages='python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libexpat1 zlib1g libssl3 libbz2-1.0 liblzma5
    libffi8 libsqlite3-0 libuuid1 libnsl2 libtirpc3 libncursesw6 libtinfo6 libreadline8 libdb5.3 libcrypt1 libgcc-s1 libcom-err2
    libgssapi-krb5-2 libk5crypto3 libkrb5-3 libkrb5support0 libkeyutils1'
make_python() {
    say "python: unpacking Debian's python3"
    mkdir "$1/tree"
    skeleton "$1/tree"
    # shellcheck disable=SC2086
    unpack "$1/tree" $python_packages
    ln -sf python3.11 "$1/tree/usr/bin/python3"
    rm -rf "$1/tree/usr/share/doc" "$1/tree/usr/share/man" "$1/tree/usr/share/lintian" "$1/tree/usr/lib/python3.11/test" \
        "$1/tree/usr/lib/python3.11/lib2to3" "$1/tree/usr/lib/python3.11/idlelib"
    mkdir -p "$1/tree/usr/lib/farfork"
    cp "$here/farfork_main.py" "$1/tree/usr/lib/farfork/main.py"
    # Compiled ahead: a guest would do it at each import, and keep nothing of it in a template.
    "$1/tree/lib64/ld-linux-x86-64.so.2" --library-path "$1/tree/lib/x86_64-linux-gnu:$1/tree/usr/lib/x86_64-linux-gnu" \
        "$1/tree/usr/bin/python3.11" -I -S -B -X pycache_prefix= -c '
import compileall, sys
sys.exit(not compileall.compile_dir(sys.argv[1], stripdir=sys.argv[2], quiet=2, workers=1, force=True,
         invalidation_mode=__import__("py_compile").PycInvalidationMode.UNCHECKED_HASH))' \
        "$1/tree/usr/lib/python3.11" "$1/tree" || say "python: some files were not compiled"
    file_system "$1/tree" "$1/python.ext4" 128
}

if [ "${1:-}" = file-system ] && [ $# -eq 4 ]; then
    file_system "$2" "$3" "$4"
    exit
fi

own_files=$(cat "$0" | key)
for wanted in "${@:-all}"; do
    case $wanted in kernel | agent | base | python | all) ;; *)
        echo "usage: build.sh [kernel|agent|base|python]..., or build.sh file-system TREE FILE MIB" >&2
        exit 2
        ;;
    esac
done
wants() { [ $# -gt 0 ] && case " $wanted_parts " in *" $1 "* | *' all '*) return 0 ;; *) return 1 ;; esac; }
wanted_parts=${*:-all}

if wants kernel; then
    part kernel "$( (version linux-source-6.1 && cat "$here/kernel.sh" "$here/edit-kernel.pl" "$here/guest-kernel.config") | key)" \
        make_kernel vmlinux bzImage
fi
if wants agent; then
    part agent "$( (cargo --version && cd "$root" && git ls-files -z crates/agent crates/types Cargo.toml Cargo.lock |
        LC_ALL=C sort -z | xargs -0 cat && echo "$own_files") | key)" make_agent initrd
fi
if wants base; then
    part base "$( (version busybox-static && version e2fsprogs && echo "$own_files") | key)" make_base base.ext4
fi
if wants python; then
    # shellcheck disable=SC2086
    part python "$( (version busybox-static && version e2fsprogs && for package in $python_packages; do version "$package"; done &&
        cat "$here/farfork_main.py" && echo "$own_files") | key)" make_python python.ext4
fi
echo "$cache/current"
