#!/usr/bin/env bash
# The unit and the mount helpers, without mounting anything: does systemd accept the unit, is it confined enough, and
# what do the helpers make of what mount(8), umount(8) and mount.fuse3(8) pass? Seconds; part of `make test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

die() { printf 'units: %s\n' "$1" >&2; exit 1; }

# Programs that only say how they were called.
for program in vdmount vdumount umount; do
    printf '#!/bin/sh\nprintf "%%s" "%s"; for word; do printf " [%%s]" "$word"; done; echo\nexit ${STUB_STATUS:-0}\n' \
        "$program" >"$folder/$program"
done
chmod 755 "$folder"/*
for file in 'vdmount@.service' mount.vdmount umount.fuse.vdmount; do
    sed "s|@bindir@|$folder|" "System/$file" >"$folder/$file"
done
chmod 755 "$folder"/*mount.*

# ---- the unit ----

command -v systemd-analyze >/dev/null || die "systemd-analyze is missing: install the package systemd"
unit="$folder/vdmount@.service"
said="$(systemd-analyze verify --man=no "$folder/vdmount@name.service" 2>&1)" || die "systemd-analyze verify: $said"
[ -z "$said" ] || die "systemd-analyze verify: $said"

# Below 3.0.
systemd-analyze security --offline=true --threshold=29 "$unit" >"$folder/security" 2>&1 \
    || die "$(tail -n 1 "$folder/security")"

# A mount namespace would hide the mount from everybody else.
separate='Private(Tmp|Devices|IPC|Users)|Protect(System|Home|Proc|KernelTunables|KernelModules|KernelLogs|ControlGroups)'
separate+='|ProcSubset|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec|Bind|BindReadOnly)Paths|TemporaryFileSystem'
separate+='|Root(Directory|Image)|DynamicUser|MountFlags'
if grep -nE "^($separate)=" "$unit"; then
    die "the lines above give the service a mount namespace of its own"
fi
grep -q '^PrivateMounts=no$' "$unit" || die "PrivateMounts=no is missing: PrivateNetwork= implies the opposite"

# ---- the helpers ----

# expect STATUS OUTPUT COMMAND...
expect() {
    local wanted_status="$1" wanted="$2" status=0 output
    shift 2
    output="$(PATH="$folder:$PATH" "$@" 2>/dev/null)" || status=$?
    [ "$status" = "$wanted_status" ] || die "$*: status $status instead of $wanted_status"
    [ "$output" = "$wanted" ] || die "$*: '$output' instead of '$wanted'"
}

mount="$folder/mount.vdmount"
expect 0 'vdmount [-o] [] [--] [/a b] [/d]' "$mount" '/a b' /d
expect 0 'vdmount [-o] [,rw] [--] [/a] [/d]' "$mount" /a /d -o rw
expect 0 'vdmount [-o] [,ro,nofail] [--] [/a] [/d]' "$mount" /a /d -s -n -v -oro,nofail
expect 0 'vdmount [-o] [,rw,x-a=b c] [--] [/a] [/d]' "$mount" /a /d -snv -o 'rw,x-a=b c' -t vdmount
expect 0 'vdmount [-o] [,uid=1,ro] [--] [-a] [--help]' "$mount" -a --help -o uid=1 -r
expect 0 'vdmount [-o] [,rw] [--] [/a] [$(d)]' "$mount" /a '$(d)' -w -t fuse.vdmount
expect 0 '' "$mount" /a /d -f -o rw
expect 0 '' "$mount" /a /d -sfnv
expect 1 '' "$mount" /a /d -N /proc/1/ns/mnt
expect 1 '' "$mount" /a
expect 1 '' "$mount" /a /d /e
expect 1 '' "$mount" /a /d -q
expect 1 '' "$mount" /a /d -o
STUB_STATUS=1 expect 32 'vdmount [-o] [,rw] [--] [/a] [/d]' "$mount" /a /d -o rw
STUB_STATUS=64 expect 32 'vdmount [-o] [,what] [--] [/a] [/d]' "$mount" /a /d -o what

umount="$folder/umount.fuse.vdmount"
expect 0 'vdumount [--] [/d e]' "$umount" '/d e'
expect 0 'vdumount [--] [/d]' "$umount" /d -n -v -r -t fuse.vdmount
expect 0 'umount [-i] [-l] [--] [/d e]' "$umount" '/d e' -l
expect 0 'umount [-i] [-f] [-l] [--] [/d]' "$umount" /d -nlf
expect 0 'umount [-i] [-N] [/proc/1/fd/3] [--] [/d]' "$umount" /d -N /proc/1/fd/3
expect 1 '' "$umount"
expect 1 '' "$umount" /d /e
STUB_STATUS=1 expect 32 'vdumount [--] [/d]' "$umount" /d

echo "units: the unit and the mount helpers are as they should be"
