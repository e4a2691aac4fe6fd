#!/usr/bin/env python3
"""A second reader of block caches (VCI), written from the layout's description alone, to judge what the first one writes.

    vci.py check FILE               is the file a cache that was closed cleanly, and sound? one line a mistake
    vci.py extents FILE             its extents in the order of use, the one used longest ago first: FIRST BLOCKS ADDRESS NODE
    vci.py flatten FILE OUT SIZE    writes a file of SIZE bytes with what is cached where the disk has it, else zeros

Little endian, packed. A block has 512 bytes. Header (2 blocks), block map (a header block and a bit a block), a B+ tree
of nodes of 8 blocks, and data.
"""
import os
import struct
import sys

BLOCK = 512
NODE = 4096
LEAF_ENTRY = struct.Struct("<QQBBQIQ")
BRANCH_ENTRY = struct.Struct("<QIQ")
assert LEAF_ENTRY.size == 38 and BRANCH_ENTRY.size == 20


class Mistake(Exception):
    pass


class Extent:
    def __init__(self, entry, node):
        self.previous, self.next, flags, reserved, self.first, self.blocks, self.address = entry
        self.node = node
        if flags or reserved:
            raise Mistake(f"the extent at {self.first} has flags {flags}, {reserved}")


class Cache:
    def __init__(self, path):
        self.file = open(path, "rb")
        self.length = os.fstat(self.file.fileno()).st_size
        self.read_header()
        self.read_map()
        self.extents, self.nodes = [], []
        self.read_node(self.root, 0, 1 << 64, 1)
        self.leaves = {extent.node for extent in self.extents}

    def read(self, address, count):
        self.file.seek(address * BLOCK)
        data = self.file.read(count)
        if len(data) != count:
            raise Mistake(f"the file ends inside {count} bytes at block {address}")
        return data

    def read_header(self):
        data = self.read(0, 1024)
        if data[:4] != b"VCI\0":
            raise Mistake("no signature")
        (version, self.size, self.unclean, self.type, self.root, self.map, self.map_blocks) = \
            struct.unpack("<IQBIQQI", data[4:41])
        self.uuid, self.modification = data[41:57], data[57:73]
        if version != 1 or self.type not in (1, 2) or self.unclean not in (0, 1):
            raise Mistake(f"version {version}, type {self.type}, unclean {self.unclean}")
        if any(data[73:]):
            raise Mistake("the header's rest is not zero")

    def read_map(self):
        data = self.read(self.map, BLOCK)
        version, self.managed, self.free, self.metadata, self.data = struct.unpack("<IQQQQ", data[4:40])
        if data[:4] != b"VBLK" or version != 1 or any(data[40:]):
            raise Mistake("the block map's header is wrong")
        if self.managed % 4096 or self.managed > self.size:
            raise Mistake(f"{self.managed} blocks managed of {self.size}")
        if self.map_blocks != 1 + self.managed // 4096:
            raise Mistake(f"the map has {self.map_blocks} blocks for {self.managed} blocks")
        if self.managed != self.free + self.metadata + self.data:
            raise Mistake(f"managed {self.managed} = free {self.free} + metadata {self.metadata} + data {self.data}?")
        self.bits = self.read(self.map + 1, self.managed // 8)

    def read_node(self, address, low, high, depth):
        if address in self.nodes or depth > 10:
            raise Mistake(f"node {address} is in the tree twice")
        self.nodes.append(address)
        data = self.read(address, NODE)
        entry = {1: BRANCH_ENTRY, 2: LEAF_ENTRY}.get(data[0])
        if entry is None:
            raise Mistake(f"node {address} is of kind {data[0]}")
        count = (NODE - 1) // entry.size
        assert count == (204 if data[0] == 1 else 107)
        entries = [entry.unpack_from(data, 1 + index * entry.size) for index in range(count)]
        used = [item for item in entries if any(item)]
        if any(data[1 + len(used) * entry.size:]):
            raise Mistake(f"node {address}: entries behind unused ones")
        if not used and depth > 1:
            raise Mistake(f"node {address} is empty")
        if data[0] == 2:
            for item in used:
                extent = Extent(item, address)
                end = extent.first + extent.blocks
                if not low <= extent.first < end <= high:
                    raise Mistake(f"node {address}: the extent {extent.first} to {end} is not in {low} to {high}")
                low = end
                self.extents.append(extent)
            return
        for index, (first, blocks, child) in enumerate(used):
            end = first + blocks
            if not low <= first < end <= high:
                raise Mistake(f"node {address}: the entry {first} to {end} is not in {low} to {high}")
            if blocks == 0xFFFFFFFF:
                end = used[index + 1][0] if index + 1 < len(used) else high
            before = len(self.extents)
            self.read_node(child, first, end, depth + 1)
            last = self.extents[-1]
            if self.extents[before].first != first:
                raise Mistake(f"node {address}: its entry begins at {first}, what it covers elsewhere")
            if blocks != min(last.first + last.blocks - first, 0xFFFFFFFF):
                raise Mistake(f"node {address}: the entry at {first} covers {blocks} blocks, not what is below it")
            low = end

    def check(self):
        if self.unclean:
            raise Mistake("was not closed cleanly")
        used = [(0, 2, "header"), (self.map, self.map_blocks, "block map")]
        used += [(node, 8, "node") for node in self.nodes]
        metadata = sum(blocks for _, blocks, _ in used)
        used += [(extent.address, extent.blocks, "data") for extent in self.extents]
        data = sum(extent.blocks for extent in self.extents)
        if (metadata, data) != (self.metadata, self.data):
            raise Mistake(f"metadata {metadata}, data {data}; counted {self.metadata}, {self.data}")
        used.sort()
        end = 0
        bits = bytearray(self.managed // 8)
        for address, blocks, what in used:
            if address < end:
                raise Mistake(f"{what} at {address} lies over something else")
            end = address + blocks
            if end > self.managed or end * BLOCK > self.length:
                raise Mistake(f"{what} ends at {end}: {self.managed} blocks, {self.length} bytes")
            for block in range(address, end):
                bits[block // 8] |= 1 << block % 8
        if bits != self.bits:
            raise Mistake("the bits are not what is in use")
        if self.length > self.size * BLOCK:
            raise Mistake(f"the file has {self.length} bytes, {self.size} blocks are its maximum")
        self.order()

    def order(self):
        """Of the extents in a node with the same one before them, the first in the disk were used first."""
        if not self.extents:
            return []
        waiting = {}
        for extent in self.extents:
            waiting.setdefault((extent.node, extent.previous), []).append(extent)
        heads = [extent for extent in self.extents if extent.previous == 0]
        if len(heads) != 1 or sum(extent.next == 0 for extent in self.extents) != 1:
            raise Mistake(f"{len(heads)} extents are the first in the order of use")
        order, extent = [], heads[0]
        while True:
            order.append(extent)
            waiting[extent.node, extent.previous].remove(extent)
            if extent.next == 0:
                break
            group = waiting.get((extent.next, extent.node))
            if not group:
                raise Mistake(f"the order of use breaks off after {len(order)} extents")
            extent = group[0]
        if len(order) != len(self.extents):
            raise Mistake(f"the order of use has {len(order)} of {len(self.extents)} extents")
        return order


def main():
    command, path = sys.argv[1:3]
    try:
        cache = Cache(path)
        if command == "check":
            cache.check()
        elif command == "extents":
            for extent in cache.order():
                print(extent.first, extent.blocks, extent.address, extent.node)
        elif command == "flatten":
            size = int(sys.argv[4])
            with open(sys.argv[3], "wb") as out:
                for extent in cache.extents:
                    out.seek(extent.first * BLOCK)
                    out.write(cache.read(extent.address, extent.blocks * BLOCK)[:max(0, size - extent.first * BLOCK)])
                out.truncate(size)
        else:
            sys.exit(__doc__)
    except Mistake as mistake:
        print(f"{path}: {mistake}")
        sys.exit(1)


main()
