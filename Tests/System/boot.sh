#!/usr/bin/env bash
# Mounts at boot, for real: a small Debian 12 is booted twice by QEMU, without hardware help. Units and fstab lines of
# both types mount images, partitions, overlays and, in one step, file systems; further fstab lines mount the file
# systems in them. The first boot writes and shuts down, the second finds it; afterwards the images are examined. Two
# more boots run memory.sh, with control groups of either version. Run by `make test-boot`, as root; ten minutes and
# more.
#     boot.sh FOLDER-OF-THE-PACKAGE
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

package="$(ls "$1"/vdmount_*.deb)"
mirror="${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
cache="$PWD/.build/debian/packages"

die() { printf 'test-boot: %s\n' "$1" >&2; exit 1; }
step() { printf '\n== %s\n' "$1"; }

# In mount and process namespaces of its own: whatever happens, nothing stays mounted or running.
if [ "${INSIDE_NAMESPACE:-}" != yes ]; then
    exec env INSIDE_NAMESPACE=yes unshare --mount --pid --fork --mount-proc --kill-child "$0" "$@"
fi

folder="$(mktemp -d /tmp/vdmount-boot-XXXXXX)"
trap 'umount -l "$folder/tree/proc" 2>/dev/null || true; [ -n "${KEEP:-}" ] || rm -rf --one-file-system "$folder"' EXIT
tree="$folder/tree"
log="$folder/log"
quietly() { "$@" >"$log" 2>&1 || { tail -n 40 "$log"; die "$1 failed"; }; }

step "a Debian 12 with the package"
mkdir -p "$tree" "$cache"
quietly debootstrap --variant=minbase --cache-dir="$cache" \
    --include=systemd-sysv,udev,dbus,kmod,e2fsprogs,mount,linux-image-cloud-amd64,initramfs-tools,fdisk,procps,fio bookworm "$tree" "$mirror"
in_tree() { chroot "$tree" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
mount -t proc proc "$tree/proc"
cp /etc/resolv.conf "$tree/etc/resolv.conf"
cp "$package" "$tree/tmp/vdmount.deb"
quietly in_tree apt-get -qq update
quietly in_tree apt-get -qq -y --no-install-recommends install /tmp/vdmount.deb
umount "$tree/proc"
rm -rf "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/* "$tree/tmp/vdmount.deb"

step "images, a unit, fstab"
export PATH="$PWD/.build/release:$PATH"
# One with a name that needs quoting everywhere, as the snapshot of another image; two plain ones.
mkdir -p "$folder/content" "$tree/srv/vm images" "$tree/srv/vms"
echo "from the image" >"$folder/content/hello"
for name in unit fstab fixed; do
    quietly mke2fs -q -t ext4 -d "$folder/content" -L "$name" "$folder/$name.raw" 96M
done
qemu-img convert -O vmdk "$folder/unit.raw" "$tree/srv/vm images/base.vmdk"
vdimg create --quiet --parent "$tree/srv/vm images/base.vmdk" "$tree/srv/vm images/unit '1' 50%.vmdk"
qemu-img convert -O vmdk "$folder/fstab.raw" "$tree/srv/vms/fstab.vmdk"
qemu-img convert -O vmdk "$folder/fixed.raw" "$tree/srv/vms/fixed.vmdk"
# With partitions: the second holds the file system.
part=$((30 << 20))
truncate -s 140M "$folder/parts.raw"
printf '%s\n' 'label: gpt' size=29M 'start=30M,size=100M,name=data' | sfdisk --quiet "$folder/parts.raw"
quietly mke2fs -q -t ext4 -d "$folder/content" -L part -E offset=$part "$folder/parts.raw" 96M
for name in part files; do qemu-img convert -O vmdk "$folder/parts.raw" "$tree/srv/vms/$name.vmdk"; done
for name in over scratch; do qemu-img convert -O vmdk "$folder/fixed.raw" "$tree/srv/vms/$name.vmdk"; done
# Those that nothing may change.
sums() { (cd "$1" && sha256sum "vm images/base.vmdk" vms/{fixed,files,over,scratch}.vmdk); }
before="$(sums "$tree/srv")"

vdimg create --quiet --size 8M "$tree/srv/vms/other.vmdk"
chown 1000 "$tree/srv/vms/other.vmdk"
chmod 600 "$tree/srv/vms/other.vmdk"

mkdir -p "$tree/mnt/unit disk" "$tree/mnt/other" "$tree/mnt/scratch"
cat >"$tree/etc/vdmount/data-1.conf" <<'END'
# Spaces, quotes, percent signs.
IMAGE="/srv/vm images/unit '1' 50%.vmdk"
MOUNTPOINT=/mnt/unit disk
OPTIONS=rw,noatime
END
cat >"$tree/etc/vdmount/missing.conf" <<'END'
IMAGE=/srv/vms/missing.vmdk
MOUNTPOINT=/mnt
END
printf '%s\n' IMAGE=/srv/vms/other.vmdk MOUNTPOINT=/mnt/other >"$tree/etc/vdmount/other.conf"
printf '%s\n' IMAGE=/srv/vms/scratch.vmdk MOUNTPOINT=/mnt/scratch OPTIONS=overlay >"$tree/etc/vdmount/scratch.conf"
cat >"$tree/etc/fstab" <<'END'
/dev/vda                    /               ext4          defaults 0 1
/mnt/unit\040disk/disk.raw  /mnt/unit-fs    ext4          loop,nofail,x-systemd.requires=vdmount@data-1.service 0 0
/srv/vms/fstab.vmdk         /mnt/fstab      vdmount       rw,nofail,x-systemd.requires-mounts-for=/srv/vms 0 0
/mnt/fstab/disk.raw         /mnt/fstab-fs   ext4          loop,nofail 0 0
/srv/vms/fixed.vmdk         /mnt/fixed      fuse.vdmount  ro,nofail,_netdev,umask=022 0 0
/mnt/fixed/disk.raw         /mnt/fixed-fs   ext4          loop,ro,noload,nofail,_netdev 0 0
/srv/vms/part.vmdk          /mnt/part       vdmount       rw,nofail 0 0
/mnt/part/part2.raw         /mnt/part-fs    ext4          loop,nofail 0 0
/srv/vms/files.vmdk         /mnt/files      vdmount       ro,fs=2,nofail 0 0
/srv/vms/over.vmdk          /mnt/over       vdmount       overlay=/srv/vms/changes,nofail 0 0
/mnt/over/disk.raw          /mnt/over-fs    ext4          loop,nofail 0 0
/srv/vms/gone.vmdk          /mnt/gone       vdmount       ro,nofail 0 0
END
install -m 755 Tests/System/boot-guest.sh "$tree/usr/local/sbin/boot-guest"
install -m 755 Tests/System/memory.sh "$tree/usr/local/sbin/memory.sh"
cat >"$tree/etc/systemd/system/boot-guest.service" <<'END'
[Unit]
Description=What the test does inside
After=multi-user.target remote-fs.target local-fs.target vdmount@data-1.service vdmount@missing.service
After=vdmount@scratch.service
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/boot-guest
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
[Install]
WantedBy=graphical.target
END
quietly in_tree systemctl enable vdmount@data-1.service vdmount@missing.service vdmount@scratch.service boot-guest.service
# A login prompt would take the serial console from the test.
quietly in_tree systemctl mask serial-getty@ttyS0.service getty@tty1.service
mkdir -p "$tree/var/log/journal"
cp "$tree"/boot/vmlinuz-* "$folder/vmlinuz"
cp "$tree"/boot/initrd.img-* "$folder/initrd"
quietly mke2fs -q -t ext4 -d "$tree" "$folder/root.img" 3G

# boot NAME [WORDS FOR THE KERNEL]
boot() {
    step "boot $1"
    # On a busy machine the emulated timer is late when the kernel checks it, so that it does not; a panic ends it all.
    timeout -k 5 "${BOOT_SECONDS:-1800}" qemu-system-x86_64 -accel tcg -smp 2 -m 1024 -no-reboot -display none \
        -monitor none -serial "file:$folder/serial-$1" -nic none \
        -kernel "$folder/vmlinuz" -initrd "$folder/initrd" \
        -append "root=/dev/vda rw console=ttyS0 systemd.show_status=1 no_timer_check panic=-1 vdmount.boot=$1 ${2:-}" \
        -drive "file=$folder/root.img,format=raw,if=virtio,cache=unsafe" </dev/null || die "boot $1: QEMU ended with $?"
    tr -d '\r' <"$folder/serial-$1" >"$folder/said-$1"
    # Without what systemd and the kernel say meanwhile.
    sed -n '/^BOOT-GUEST begins/,/^BOOT-GUEST ends/p' "$folder/said-$1" \
        | grep -vE '^\[|^ +(Starting|Stopping|Mounting|Unmounting)\b'
    if ! grep -q "^BOOT-GUEST ends: all as it should be" "$folder/said-$1"; then
        tail -n 60 "$folder/said-$1"
        die "boot $1 failed"
    fi
    # The last seconds: nothing is still there to be waited for or killed, and nothing refuses to go.
    if grep -E 'Waiting for process|Killing process|Failed unmounting|Could not detach' "$folder/said-$1"; then
        die "boot $1: the lines above are from its shutdown"
    fi
}
boot 1
boot 2

step "the images afterwards"
quietly e2fsck -fn "$folder/root.img"
mkdir "$folder/after"
quietly debugfs -R "rdump /srv $folder/after" "$folder/root.img"
images="$folder/after/srv"
for image in "$images/vm images/unit '1' 50%.vmdk" "$images"/vms/{fstab,fixed,part,files,over,scratch}.vmdk; do
    vdimg check --chain "$image"
    qemu-img check -q -f vmdk "$image"
done
[ "$before" = "$(sums "$images")" ] || die "an image changed that may not"
vdimg check "$images/vms/changes"
for image in "$images/vm images/unit '1' 50%.vmdk" "$images"/vms/{fstab,part}.vmdk; do
    qemu-img convert -O raw "$image" "$folder/disk.raw"
    disk="$folder/disk.raw"
    [ "${image##*/}" != part.vmdk ] || disk="$disk?offset=$part"
    e2fsck -fn "$disk"
    for name in written-1 written-2; do
        debugfs -R "dump /$name $folder/written" "$disk" 2>/dev/null
        debugfs -R "dump /root/$name $folder/expected" "$folder/root.img" 2>/dev/null
        [ "$(stat -c %s "$folder/expected")" = 20000000 ] || die "$name is missing in the root file system"
        cmp "$folder/written" "$folder/expected"
        rm "$folder/written" "$folder/expected"
    done
done

# With version 2 of control groups, and with version 1.
boot memory "vdmount.seconds=${BOOT_MEMORY_SECONDS:-20}"
boot memory-1 "vdmount.seconds=${BOOT_MEMORY_SECONDS:-20} systemd.unified_cgroup_hierarchy=0"

printf '\ntest-boot: all as it should be: %s\n' "${package##*/}"
