#!/usr/bin/env bash
# The Debian package: clean under lintian, complete, without the Swift runtime among its needs; installed in a bare
# Debian 12 tree, used there as debian/tests does it, and purged without a trace. Run by `make test-deb`, as root.
#     deb.sh FOLDER-OF-THE-PACKAGE
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

package="$(ls "$1"/vdmount_*.deb)"
changes="$(ls "$1"/vdmount_*.changes)"
mirror="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
cache="$PWD/.build/debian/packages"

die() { printf 'test-deb: %s\n' "$1" >&2; exit 1; }
step() { printf '\n== %s\n' "$1"; }

# In mount and process namespaces of its own: whatever happens, nothing stays mounted or running.
if [ "${INSIDE_NAMESPACE:-}" != yes ]; then
    exec env INSIDE_NAMESPACE=yes unshare --mount --pid --fork --mount-proc --kill-child "$0" "$@"
fi

folder="$(mktemp -d /tmp/vdmount-deb-XXXXXX)"
trap 'umount -l "$folder"/tree/{proc,sys,run} 2>/dev/null || true; rm -rf --one-file-system "$folder"' EXIT
tree="$folder/tree"

step "lintian"
lintian --allow-root --fail-on error,warning --info "$changes"
for page in docs/man/*; do mandoc -Tlint -W warning "$page"; done

step "what the package holds and needs"
dpkg-deb -x "$package" "$folder/content"
for program in vdmount vdumount vdimg; do
    for file in "bin/$program" "share/bash-completion/completions/$program" \
        "share/zsh/vendor-completions/_$program" "share/fish/vendor_completions.d/$program.fish"; do
        [ -s "$folder/content/usr/$file" ] || die "/usr/$file is missing"
    done
    ls "$folder/content/usr/share/man"/man[18]/"$program".[18].gz
    needed="$(readelf -d "$folder/content/usr/bin/$program" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')"
    ! grep -E 'swift|Foundation|dispatch|BlocksRuntime' <<<"$needed" || die "$program needs the Swift runtime"
done
for script in "$folder/content"/usr/share/bash-completion/completions/*; do bash -n "$script"; done
for script in "$folder/content"/usr/sbin/*; do sh -n "$script"; done
! command -v zsh >/dev/null || for script in "$folder/content"/usr/share/zsh/*/_*; do zsh -n "$script"; done
! command -v fish >/dev/null || for script in "$folder/content"/usr/share/fish/*/*; do fish -n "$script"; done
dpkg-deb -f "$package" Depends
grep -qrI @bindir@ "$folder/content" && die "@bindir@ was left in a file"

step "a bare Debian tree"
mkdir -p "$tree" "$cache"
debootstrap --variant=minbase --cache-dir="$cache" bookworm "$tree" "$mirror" >"$folder/log" || { cat "$folder/log"; exit 1; }
in_tree() { chroot "$tree" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
mount -t proc proc "$tree/proc"
mount -t sysfs -o ro sysfs "$tree/sys"
mount -t tmpfs tmpfs "$tree/run"
mknod -m 666 "$tree/dev/fuse" c 10 229 2>/dev/null || true
# The loop devices of this machine are those of the tree.
mknod -m 660 "$tree/dev/loop-control" c 10 237
for number in $(seq 0 15); do mknod -m 660 "$tree/dev/loop$number" b 7 "$number"; done
cp /etc/resolv.conf "$tree/etc/resolv.conf"
in_tree apt-get -qq update
in_tree apt-get -qq -y --no-install-recommends install mount e2fsprogs fdisk >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }

# All names in the tree but what apt, dpkg and mount(8) write of themselves, and what adduser does, which libibverbs1 makes
# a group with (libiscsi7 needs that).
listing() {
    (cd "$tree" && find . -xdev \( -path ./var/lib/dpkg -o -path ./var/cache -o -path ./var/lib/apt -o -path ./var/log \
        -o -path ./tmp -o -path ./etc/ld.so.cache -o -path ./etc/gshadow- \) -prune -o -print
        find ./run -mindepth 1 ! -path './run/mount*' ! -path ./run/adduser) | sort
}
listing >"$folder/before"

step "install"
cp "$package" "$tree/tmp/vdmount.deb"
in_tree apt-get -qq -y --no-install-recommends install /tmp/vdmount.deb >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
in_tree dpkg --verify vdmount
in_tree vdmount --version
in_tree ldd /usr/bin/vdmount

step "mount, read, write, unmount: debian/tests/mount"
install -m 755 debian/tests/mount "$tree/tmp/test"
in_tree /tmp/test
if grep -F " $tree/" /proc/self/mounts | grep fuse.vdmount; then die "something is still mounted"; fi

step "removing it unmounts"
in_tree sh -c 'cd /tmp && vdimg create --size 1M left.vmdk && mkdir left && vdmount left.vmdk left && ls left/disk.raw'
in_tree sh -c 'cd /tmp && truncate -s 8M fs.raw && mkfs.ext4 -q fs.raw && mkdir files && vdmount --fs fs.raw files'
in_tree test -d /tmp/files/lost+found
in_tree apt-get -qq -y remove vdmount >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
[ ! -e "$tree/tmp/left/disk.raw" ] || die "the disk is still mounted"
[ ! -e "$tree/tmp/files/lost+found" ] || die "the file system is still mounted"
[ -e "$tree/etc/vdmount/example.conf" ] || die "removing took a configuration file away"

step "purge: nothing is left"
in_tree apt-get -qq -y --purge autoremove vdmount >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
listing >"$folder/after"
diff "$folder/before" "$folder/after" || die "the lines with > were left behind"
if pgrep -x vdmount; then die "a vdmount is still running"; fi

printf '\ntest-deb: all as it should be: %s\n' "${package##*/}"
