#!/usr/bin/env bash
# A VMDK snapshot chain from end to end: made by other tools, mounted, read, written; the base stays as it was.
# Run by `make demo`; works in a folder of its own under /tmp and leaves nothing behind.
set -euo pipefail

readonly ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PATH="${VDMOUNT_BIN:-$ROOT/.build/release}:$PATH:/usr/sbin:/sbin"

die() { printf 'demo: %s\n' "$1" >&2; exit 1; }

if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "mounting a file system from a loop device needs root: run this as root"
    echo "demo: mounting a file system from a loop device needs root; going on through sudo"
    exec sudo env "VDMOUNT_BIN=${VDMOUNT_BIN:-}" "PATH=$PATH" "${BASH_SOURCE[0]}" "$@"
fi
for tool in vdmount vdumount vdimg qemu-img mkfs.ext4 losetup sha256sum; do
    command -v "$tool" >/dev/null || die "$tool is missing: run 'make deps build'"
done
[ -e /dev/fuse ] || die "/dev/fuse is missing: load the module fuse (modprobe fuse)"
[ -e /dev/loop-control ] || die "/dev/loop-control is missing: load the module loop (modprobe loop)"

work="$(mktemp -d "${TMPDIR:-/tmp}/vdmount-demo.XXXXXX")"
clean_up() {
    local status=$?
    cd /
    if mountpoint -q "$work/fs"; then umount "$work/fs" || umount -l "$work/fs"; fi
    losetup --list --noheadings --output NAME --associated "$work/disk/disk.raw" 2>/dev/null |
        while read -r device; do losetup --detach "$device"; done || true
    if mountpoint -q "$work/disk" || mountpoint -q "$work/disk/disk.raw"; then
        vdumount "$work/disk" || umount -l "$work/disk" || true
    fi
    rm -rf --one-file-system "$work"
    [ "$status" = 0 ] || printf 'demo: failed (status %s)\n' "$status" >&2
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
cd "$work"

if [ -t 1 ]; then bold=$'\e[1m' plain=$'\e[0m'; else bold='' plain=''; fi
number=0
step() { number=$((number + 1)); printf '\n%s%d. %s%s\n' "$bold" "$number" "$1" "$plain"; }
# Shows a command line, then runs it.
show() { printf '$ %s\n' "$1"; eval "$1"; }
# A loop device lets go of its file a moment after umount.
wait_for_loop() {
    for _ in $(seq 100); do
        [ -n "$(losetup --associated disk/disk.raw)" ] || return 0
        sleep 0.05
    done
    die "the loop device did not let go of disk.raw"
}

step "Other tools make the base: a VMDK image with an ext4 file system and two files."
mkdir files disk fs
echo "Written before the snapshot." >files/hello.txt
seq 1 200000 >files/numbers.txt
show "truncate -s 256M base.raw"
show "mkfs.ext4 -q -L demo -d files base.raw"
show "qemu-img convert -O vmdk -o subformat=monolithicSparse base.raw base.vmdk"
show "sha256sum base.vmdk | tee base.sha256"

step "A snapshot on top of it: an empty differencing image, in which new writes will land."
show "vdimg create --parent base.vmdk child.vmdk"

step "vdmount exposes the chain as one raw file, writable."
show "vdmount --rw child.vmdk disk"
show "ls -lsh disk"

step "A raw file can be loop-mounted: here is the file system of the disk."
show "mount -o loop disk/disk.raw fs"
show "ls -l fs"
show "cat fs/hello.txt"
cmp files/numbers.txt fs/numbers.txt || die "numbers.txt reads differently through the chain"

step "A file written through the snapshot."
show "echo 'Written into the snapshot.' > fs/new.txt"
show "sync -f fs/new.txt"

step "Unmount. When vdumount returns, everything is on disk and the images are free."
show "umount fs"
wait_for_loop
show "vdumount disk"

step "The base did not change by a byte; the new file is in the snapshot alone."
show "sha256sum --check base.sha256"
show "ls -ls base.vmdk child.vmdk"
show "vdimg info --chain child.vmdk"

step "The snapshot once more, read-only: the new file is there."
show "vdmount child.vmdk disk"
show "mount -o loop,ro disk/disk.raw fs"
show "cat fs/new.txt"
[ "$(cat fs/new.txt)" = "Written into the snapshot." ] || die "new.txt does not hold what was written"
show "umount fs"
wait_for_loop
show "vdumount disk"

step "What another tool says of both images."
show "qemu-img check base.vmdk"
show "qemu-img check child.vmdk"
sha256sum --check --status base.sha256 || die "the base changed"

printf '\n%sAll as it should be.%s\n' "$bold" "$plain"
