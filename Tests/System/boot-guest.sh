#!/bin/bash
# What Tests/System/boot.sh does inside the machine: looks, writes, and shuts down.
set -uo pipefail

boot="$(sed 's/.*vdmount.boot=\([^ ]*\).*/\1/' /proc/cmdline)"
failures=0
check() {
    if "${@:2}" >/tmp/said 2>&1; then echo "well: $1"; else echo "WRONG: $1"; sed 's/^/    /' /tmp/said; failures=$((failures + 1)); fi
}
has() { grep -q -- "$@"; }

echo
echo "BOOT-GUEST begins"

if [[ $boot = memory* ]]; then
    seconds="$(sed 's/.*vdmount.seconds=\([0-9]*\).*/\1/' /proc/cmdline)"
    # Less than 256 MiB, since all is emulated.
    check "short of memory for $seconds seconds" memory.sh /usr/bin "$seconds" 96
    cat /tmp/said
    if [ $failures = 0 ]; then echo "BOOT-GUEST ends: all as it should be"; else echo "BOOT-GUEST ends: it failed"; fi
    systemctl --no-block poweroff
    exit
fi

for unit in data-1 missing scratch; do
    for _ in $(seq 100); do [ "$(systemctl show -P ActiveState "vdmount@$unit")" = activating ] || break; sleep 0.2; done
done

check "the unit is up" systemctl is-active vdmount@data-1
check "systemd shows what is mounted" has "unit '1' 50%.vmdk is at /mnt/unit disk, read-write" \
    <(systemctl show -P StatusText vdmount@data-1)
check "a type vdmount is mounted" systemctl is-active mnt-fstab.mount
check "a type fuse.vdmount is mounted" systemctl is-active mnt-fixed.mount
check "seven mounts of ours" test "$(grep -c ' fuse.vdmount ' /proc/mounts)" = 7
for name in unit-fs fstab-fs fixed-fs part-fs over-fs files; do
    check "the file system in $name" test "$(cat /mnt/$name/hello)" = "from the image"
done
check "partitions are files" test "$(stat -c %s /mnt/part/part1.raw /mnt/part/part2.raw | tr '\n' ' ')" = "30408704 104857600 "
check "info.json says what they hold" has '"kind" : "ext4"' /mnt/part/info.json
check "--fs in fstab is read-only" has ' /mnt/files ext4 ro,' /proc/mounts
vdmount --list --json >/tmp/list
for place in "/mnt/unit disk" /mnt/fstab /mnt/fixed /mnt/part /mnt/over /mnt/scratch; do
    check "$place is listed" has "\"mountpoint\" : \"$place\"" /tmp/list
done
check "and the files" has '"files" : "/mnt/files"' /tmp/list
check "and the overlay" has '"path" : "/srv/vms/changes"' /tmp/list
check "a unit with an overlay is up" systemctl is-active vdmount@scratch
check "what was scratched is gone" cmp -n 512 /mnt/scratch/disk.raw /dev/zero
check "it can be written to" dd if=/dev/urandom of=/mnt/scratch/disk.raw bs=512 count=1 conv=notrunc,fsync
check "read-only is read-only" has ' /mnt/fixed fuse.vdmount ro,' /proc/mounts

check "an image that is missing fails" systemctl is-failed vdmount@missing
systemctl status --no-pager vdmount@missing >/tmp/status 2>&1
check "status shows our message" has 'vdmount: /srv/vms/missing.vmdk: .*no such file' /tmp/status
check "status shows it as the service's too" has 'Status: "/srv/vms/missing.vmdk: .*no such file' /tmp/status
sed 's/^/    /' /tmp/status
check "an fstab line that fails does not stop the boot" systemctl is-failed mnt-gone.mount
check "its message is in the journal" has 'vdmount: /srv/vms/gone.vmdk: ' <(journalctl -b -u mnt-gone.mount)
check "the service is confined" test "$(awk '/^Seccomp:/ { print $2 }' "/proc/$(systemctl show -P MainPID vdmount@data-1)/status")" = 2
check "it has one capability" has '^CapEff:	0000000000200000$' "/proc/$(systemctl show -P MainPID vdmount@data-1)/status"

if [ "$boot" = 1 ]; then
    # --fs by systemd, and by hand.
    check "umount of --fs" systemctl stop mnt-files.mount
    check "nothing of it is left" test -z "$(grep -E ' /mnt/files | /run/vdmount/fs' /proc/mounts; ls /run/vdmount/fs)"
    check "--fs by hand" vdmount --fs=2 /srv/vms/files.vmdk /mnt/files
    check "its files" test "$(cat /mnt/files/hello)" = "from the image"
    check "vdumount takes all back" vdumount /mnt/files
    check "nothing is left of that either" test -z "$(grep -E ' /mnt/files | /run/vdmount/fs' /proc/mounts; ls /run/vdmount/fs)"
    check "and again by systemd" systemctl start mnt-files.mount
    # An image that only another user may open needs more than the unit has.
    check "another user's image is refused" has 'ermission denied' \
        <(systemctl start vdmount@other; systemctl show -P StatusText vdmount@other)
    mkdir -p /run/systemd/system/vdmount@other.service.d
    printf '[Service]\nCapabilityBoundingSet=CAP_DAC_OVERRIDE\n' >/run/systemd/system/vdmount@other.service.d/more.conf
    systemctl daemon-reload
    check "with a drop-in it is mounted" systemctl start vdmount@other
    check "its disk can be read" cmp -n 4096 /mnt/other/disk.raw /dev/zero
    check "umount alone stops the unit" umount /mnt/other
    for _ in $(seq 50); do [ "$(systemctl show -P ActiveState vdmount@other)" = inactive ] && break; sleep 0.2; done
    check "which is well" test "$(systemctl show -P Result vdmount@other)" = success
    # Stopping closes the image; then it can be had again.
    check "stop what lies on it and the unit" systemctl stop mnt-unit\\x2dfs.mount vdmount@data-1
    check "nothing is mounted there" test ! -e "/mnt/unit disk/disk.raw"
    check "the image is free and well" vdimg check --chain "/srv/vm images/unit '1' 50%.vmdk"
    check "start both again" systemctl start mnt-unit\\x2dfs.mount
    check "the unit came with it" systemctl is-active vdmount@data-1
    # In use without systemd's knowledge: the stop waits for the user, and is told why.
    check "stop the file system" systemctl stop mnt-unit\\x2dfs.mount
    exec 9<"/mnt/unit disk/disk.raw"
    systemctl stop --no-block vdmount@data-1
    sleep 3
    check "a stop waits while the disk is in use" test "$(systemctl show -P ActiveState vdmount@data-1)" = deactivating
    check "and says for whom" has "/mnt/unit disk: in use" <(systemctl show -P StatusText vdmount@data-1)
    check "what is open can still be read" cmp -n 4096 /dev/fd/9 /dev/zero -i 1024:0 -n 1
    exec 9<&-
    for _ in $(seq 50); do [ "$(systemctl show -P ActiveState vdmount@data-1)" = inactive ] && break; sleep 0.2; done
    check "then it ends, well" test "$(systemctl show -P ActiveState vdmount@data-1) $(systemctl show -P Result vdmount@data-1)" = "inactive success"
    check "and starts again" systemctl start mnt-unit\\x2dfs.mount
    # umount returns when the disk is closed; mount brings back what fstab says.
    check "umount of an fstab line" systemctl stop mnt-fstab\\x2dfs.mount mnt-fstab.mount
    check "its process is gone" test -z "$(grep -ls "[f]stab.vmdk" /proc/[0-9]*/cmdline)"
    mount -a -t ext4,vdmount
    check "mount -a mounts it again" test -e /mnt/fstab-fs/hello
    # By systemd, so that its process is not one of this service.
    check "umount" umount /mnt/fstab-fs /mnt/fstab
    check "start" systemctl start mnt-fstab\\x2dfs.mount
fi
if [ "$boot" = 2 ]; then
    for name in unit fstab part over; do
        check "what boot 1 wrote to $name" cmp /root/written-1 /mnt/$name-fs/written-1
    done
    echo "the end of boot 1:"
    journalctl -b -1 -o short-monotonic --no-pager -u 'vdmount@*' -u 'mnt-*' | tail -n 40 | sed 's/^/    /'
    check "the Swift runtime has nothing to complain of" test -z "$(journalctl -t vdmount | grep -i thread)"
    check "no process was left over or killed" test -z "$(journalctl -b -1 | grep -iE 'left-over|sigkill|timed out|dumped core')"
fi

# Left in the page cache: the shutdown has to bring it to the image.
head -c 20000000 /dev/urandom >"/root/written-$boot"
for name in unit fstab part over; do cp "/root/written-$boot" "/mnt/$name-fs/"; done

if [ $failures = 0 ]; then echo "BOOT-GUEST ends: all as it should be"; else echo "BOOT-GUEST ends: $failures failures"; fi
systemctl --no-block poweroff
