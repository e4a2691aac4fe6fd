#!/bin/bash
# Makes the documentation of the library with DocC, from the modules of a build: documentation.sh BUILD OUTPUT.
# A link that leads nowhere, or a parameter that is named but not all of them are, is an error.
set -euo pipefail

build=$1
output=$2
cd "$(dirname "$0")/.."
triple=$(swift -print-target-info | sed -n 's/.*"unversionedTriple": "\(.*\)".*/\1/p')
graphs=$(mktemp -d)
trap 'rm -rf "$graphs"' EXIT

maps=()
for map in "$build"/CLinux.build/module.modulemap Sources/*/module.modulemap \
    .build/*/checkouts/swift-system/Sources/CSystem/include/module.modulemap \
    .build/checkouts/swift-system/Sources/CSystem/include/module.modulemap; do
    if [ -f "$map" ] && [[ " ${maps[*]} " != *CSystem* || $map != *CSystem* ]]; then
        maps+=(-Xcc "-fmodule-map-file=$map")
    fi
done
for module in VirtualDisk DiskStorage DiskNetwork; do
    swift symbolgraph-extract -module-name "$module" -target "$triple" -I "$build/Modules" "${maps[@]}" \
        -minimum-access-level public -output-dir "$graphs"
done
docc convert Sources/VirtualDisk/VirtualDisk.docc --additional-symbol-graph-dir "$graphs" --warnings-as-errors \
    --fallback-display-name VirtualDisk --fallback-bundle-identifier vdmount.VirtualDisk --output-path "$output"
