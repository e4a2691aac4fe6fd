#!/usr/bin/env bash
# A machine short of memory: the daemon and the load, fio on ext4 on a loop device on disk.raw, share a control group of
# 256 MiB; neither hangs nor loses anything. For half of the time the loop device uses the page cache below it, for the
# other half direct I/O. `make test-memory` runs it for two minutes, `make test` for seconds; as root.
#     memory.sh FOLDER-OF-THE-PROGRAMS SECONDS [MIB]     with another limit, and as much less to do
#     memory.sh --possible        can a group be made here? If not, says why, with status 77
set -euo pipefail

megabytes="${3:-256}"
# Far more than it takes: what has not ended by then never will.
patience=${MEMORY_PATIENCE:-900}

die() { printf 'test-memory: %s\n' "$1" >&2; exit 1; }
step() { printf '\n== %s\n' "$1"; }

# ---- the control group ----

# The mount point of the control groups of a type that have an option, from /proc/self/mountinfo; the fields before the
# "-" vary in number.
mount_of() {
    awk -v type="$1" -v option="$2" '{
        for (i = 7; i < NF; i++) if ($i == "-") break
        if ($(i + 1) == type && (option == "" || ("," $(i + 3) ",") ~ ("," option ","))) { print $5; exit }
    }' /proc/self/mountinfo
}

# Says where a group can be made, and by which version of control groups: `1 FOLDER` or `2 FOLDER`. With version 1 that
# is below this process's own group, so that it leaves no limit. With version 2 a group that holds processes cannot have
# groups with limits below it, so it is at the top.
find_groups() {
    local folder own
    [ "$(id -u)" = 0 ] || { echo "limits of memory need root"; return 77; }
    folder="$(mount_of cgroup memory)"
    if [ -n "$folder" ]; then
        own="$(awk -F: '("," $2 ",") ~ /,memory,/ { sub(/^[^:]*:[^:]*:/, ""); print }' /proc/self/cgroup)"
        [ -d "$folder$own" ] || own=
        folder="$folder${own%/}"
        [ -w "$folder/cgroup.procs" ] || { echo "$folder cannot be written"; return 77; }
        echo "1 $folder"
        return
    fi
    folder="$(mount_of cgroup2 "")"
    [ -n "$folder" ] || { echo "no control groups are mounted"; return 77; }
    grep -qw memory "$folder/cgroup.controllers" || { echo "$folder has no memory controller"; return 77; }
    if ! grep -qw memory "$folder/cgroup.subtree_control" 2>/dev/null; then
        (echo +memory >"$folder/cgroup.subtree_control") 2>/dev/null \
            || { echo "$folder does not let its groups have limits of memory"; return 77; }
    fi
    echo "2 $folder"
}

if [ "${1:-}" = --possible ]; then
    find_groups
    exit
fi
[ $# = 2 ] || [ $# = 3 ] || die "usage: memory.sh FOLDER-OF-THE-PROGRAMS SECONDS [MIB]"

# ---- outside: watches, and takes everything away ----

if [ "${INSIDE_NAMESPACE:-}" != yes ]; then
    found="$(find_groups)" || { echo "test-memory: not possible here: $found" >&2; exit 77; }
    export VERSION="${found%% *}" GROUP="${found#* }/vdmount-memory-$$"
    folder="$(mktemp -d /tmp/vdmount-memory-XXXXXX)"
    export FOLDER="$folder" INSIDE_NAMESPACE=yes
    mkdir "$GROUP"
    unshare --mount --pid --fork --mount-proc --kill-child "$0" "$@" &
    child=$!
    finish() {
        kill -KILL "$child" 2>/dev/null || true
        for _ in $(seq 100); do rmdir "$GROUP" 2>/dev/null && break; sleep 0.1; done
        rm -rf --one-file-system "$folder"
    }
    trap finish EXIT
    trap 'exit 1' INT TERM
    for _ in $(seq $(($2 + patience))); do
        if ! kill -0 "$child" 2>/dev/null; then
            status=0
            wait "$child" || status=$?
            exit "$status"
        fi
        sleep 1
    done
    echo "test-memory: it hangs:" >&2
    for process in $(cat "$GROUP/cgroup.procs"); do
        tr '\0' ' ' <"/proc/$process/cmdline"
        printf '\n'
        for thread in "/proc/$process/task"/*; do
            printf '  thread %s: %s\n' "${thread##*/}" "$(sed -n 's/^State:[[:space:]]*//p' "$thread/status")"
            sed 's/^/    /' "$thread/stack"
        done
    done >&2 2>/dev/null
    # Whoever waits for the daemon gets an error, and can be ended.
    mkdir "$folder/fusectl"
    unshare --mount sh -c 'mount -t fusectl none "$0" && echo 1 >"$0/$1/abort"' \
        "$folder/fusectl" "$(cat "$folder/connection")" || true
    sleep 5
    exit 1
fi

# ---- inside ----

cd "$FOLDER"
PATH="$(cd "$OLDPWD" && cd "$1" && pwd):$PATH"
seconds="$2"
mount -t tmpfs -o mode=755 tmpfs /run

# Runs a command in the group.
inside() { (echo 0 >"$GROUP/cgroup.procs" && "$@"); }

if [ "$VERSION" = 1 ]; then
    echo "${megabytes}M" >"$GROUP/memory.limit_in_bytes"
    # Swapping would let the load get by.
    echo "${megabytes}M" >"$GROUP/memory.memsw.limit_in_bytes" 2>/dev/null || true
else
    echo "${megabytes}M" >"$GROUP/memory.max"
    echo 0 >"$GROUP/memory.swap.max" 2>/dev/null || true
fi
# The most memory that the group has had, and how many processes the kernel killed for want of it.
most() {
    local file="$GROUP/memory.peak"
    [ "$VERSION" = 2 ] || file="$GROUP/memory.max_usage_in_bytes"
    echo $(($(cat "$file") >> 20))
}
killed() {
    local file="$GROUP/memory.events"
    [ "$VERSION" = 2 ] || file="$GROUP/memory.oom_control"
    awk '$1 == "oom_kill" { print $2 }' "$file"
}

# The daemon is in the group as well, unless that cannot go well by the kernel's own rules: under version 1, who needs
# memory waits for pages that are being written, the daemon for what it shall write itself, except for processes with
# PR_SET_IO_FLUSHER, which takes CAP_SYS_RESOURCE.
serve() { inside vdmount "$@"; }
if [ "$VERSION" = 1 ] && (((0x$(awk '/^CapEff:/ { print $2 }' /proc/self/status) >> 24 & 1) == 0)); then
    echo "test-memory: the daemon stays outside of the group: there is no CAP_SYS_RESOURCE here" >&2
    serve() { vdmount "$@"; }
fi

# Small writes through the page cache with a sync now and then, larger ones past it, and large ones front to back;
# together more than what the group may hold. Each block holds the number of the round and its place, and is read back and
# compared at the end: what was lost, is older or lies elsewhere is found.
load() {
    fio --output-format=terse --output="$FOLDER/fio" --directory="$FOLDER/files" --randseed="$1" --verify=pattern \
        --verify_pattern="$(printf '0x%08x%%o' "$1")" --verify_fatal=1 --thread "${@:2}" \
        --name=cached --ioengine=psync --rw=randwrite --bs=4k --size=$((megabytes * 3 / 16))m --fsync=256 \
        --name=direct --ioengine=libaio --iodepth=16 --direct=1 --rw=randwrite --bs=32k --size=$((megabytes / 4))m \
        --name=large --ioengine=psync --rw=write --bs=1m --size=$((megabytes * 9 / 8))m \
        || { cat "$FOLDER/fio" >&2; die "fio found that the data is not what was written"; }
}

step "a snapshot over an image, read-write, in $GROUP"
mkdir disk files
vdimg create --quiet --size 1G base.vmdk
vdimg create --quiet --parent base.vmdk disk.vmdk
before="$(sha256sum base.vmdk)"
serve --rw disk.vmdk disk
stat -c %d disk >"$FOLDER/connection"
inside mkfs.ext4 -q -F disk/disk.raw

deadline() { [ "$SECONDS" -ge "$1" ]; }
round=0
for direct in off on; do
    step "the loop device with --direct-io=$direct"
    end=$((SECONDS + seconds / 2))
    device="$(inside losetup --find --show --direct-io=$direct disk/disk.raw)"
    inside mount "$device" files
    # Detached by the last unmount, whoever does it.
    losetup --detach "$device"
    while :; do
        round=$((round + 1))
        inside load $round
        echo "round $round: well; at most $(most) MiB"
        deadline "$end" && break
    done
    umount files
done

step "afterwards"
# The daemon, and the keeper that unmounts for it.
for process in $(pgrep -x vdmount); do grep -E '^Pid|^VmHWM|^RssAnon' "/proc/$process/status"; done
# From the image, by another process: nothing that was read is left in memory.
vdumount disk
[ "$(killed)" = 0 ] || die "the kernel killed a process for want of memory"
[ "$(most)" -gt $((megabytes - 4)) ] || die "the limit was never reached: this shows nothing"
vdimg check --chain disk.vmdk
! command -v qemu-img >/dev/null || qemu-img check -q -f vmdk disk.vmdk
[ "$(sha256sum base.vmdk)" = "$before" ] || die "the base changed"
# Writable, as fio opens what it shall only verify.
serve --overlay --overlay-dir "$FOLDER" disk.vmdk disk
e2fsck -fn disk/disk.raw
mount -o loop disk/disk.raw files
inside load $round --verify_only
umount files
# A test of the test: it sees when that is not what was written last.
mount -o loop disk/disk.raw files
! (inside load $((round + 1)) --verify_only) >/dev/null 2>&1 || die "fio does not notice older data"
umount files
vdumount disk

printf '\ntest-memory: all as it should be: %s rounds in %s MiB\n' "$round" "$megabytes"
