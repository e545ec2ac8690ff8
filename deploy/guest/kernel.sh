#!/bin/sh
# Builds the guest kernel from Debian's linux-source package. usage: kernel.sh SOURCE_TAR OUTPUT_VMLINUX
set -eu
here=$(cd "$(dirname "$0")" && pwd)
source=$1
output=$2

work=$(mktemp -d "$(dirname "$output")/.kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

echo "guest: kernel: unpacking $(basename "$source")"
tar --extract --file "$source" --directory "$work" --strip-components 1
perl "$here/edit-kernel.pl" "$work"

# What a build writes into its result besides the source: the same for everybody.
export KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970' KBUILD_BUILD_USER=farfork KBUILD_BUILD_HOST=farfork
export KBUILD_BUILD_VERSION=1 LC_ALL=C

cd "$work"
log=$output.log
make --silent tinyconfig >"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
scripts/kconfig/merge_config.sh -m .config "$here/guest-kernel.config" >>"$log" 2>&1
make --silent olddefconfig >>"$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }

# An option that the source does not know, or that another one forbids, is dropped without a word.
missing=$(grep -E '^CONFIG_[A-Z0-9_]+=[ym]' "$here/guest-kernel.config" | while read -r option; do
    grep -qxF "$option" .config || echo "$option"
done)
if [ -n "$missing" ]; then
    echo "error: the kernel was not configured as deploy/guest/guest-kernel.config asks; it lacks:" $missing >&2
    exit 1
fi

echo "guest: kernel: building (3 to 8 minutes on two cores)"
if ! make --silent -j"$(nproc)" vmlinux bzImage >>"$log" 2>&1; then
    echo "error: the kernel does not build; the end of $log:" >&2
    tail -n 30 "$log" >&2
    exit 1
fi
strip --strip-debug -o "$output.new" vmlinux
cp arch/x86/boot/bzImage "$(dirname "$output")/bzImage"
mv "$output.new" "$output"
