#!/usr/bin/env python3
"""Reads and makes VDI images for the tests, straight from the format's description: nothing of it is shared with the
code that is tested.

    vdi.py flatten IMAGE OUT [--folder DIR]... [--raw UUID=FILE]...   the disk of a chain, as a raw file
    vdi.py check IMAGE [--open]     invariants of one image; with --open, of one that was not closed
    vdi.py info IMAGE               the header, one NAME=VALUE a line
    vdi.py make RAW OUT [options]   an image of what RAW holds
"""
import argparse
import os
import random
import struct
import sys
import uuid

SIGNATURE = 0xBEDA107F
FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
NULL = uuid.UUID(int=0)


class Broken(Exception):
    """An image that is not as the format says."""


def need(holds, text):
    if not holds:
        raise Broken(text)


class Image:
    """A header, and the block map."""

    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb")
        self.length = os.fstat(self.file.fileno()).st_size
        head = self.file.read(512)
        need(len(head) >= 420, "the file is too short")
        signature, version = struct.unpack_from("<II", head, 64)
        need(signature == SIGNATURE, "no signature")
        self.major, self.minor = version >> 16, version & 0xFFFF
        if self.major == 0:
            self.header_size = 0
            self.type, self.flags = struct.unpack_from("<II", head, 72)
            comment, rest = head[80:336], 336
        else:
            need((self.major, self.minor) == (1, 1), f"version {self.major}.{self.minor}")
            self.header_size, self.type, self.flags = struct.unpack_from("<III", head, 72)
            comment = head[84:340]
            self.map_offset, self.data_offset = struct.unpack_from("<II", head, 340)
            rest = 348
        self.comment = comment.split(b"\0")[0].decode()
        self.geometry = struct.unpack_from("<IIII", head, rest)
        if self.major == 0:
            self.size, self.block, self.blocks, self.allocated = struct.unpack_from("<QIII", head, rest + 16)
            self.extra = 0
            self.map_offset, self.data_offset = 420, 420 + 4 * self.blocks
            ids = rest + 36
        else:
            self.size, self.block, self.extra, self.blocks, self.allocated = struct.unpack_from("<QIIII", head, rest + 20)
            ids = rest + 44
        names = ["uuid", "modification", "parent", "parent_modification"][:3 if self.major == 0 else 4]
        self.parent_modification = NULL
        for index, name in enumerate(names):
            setattr(self, name, uuid.UUID(bytes_le=head[ids + 16 * index:ids + 16 * index + 16]))
        self.bios = struct.unpack_from("<IIII", head, 456) if self.header_size >= 400 else None
        need(self.type in (1, 2, 3, 4), f"type {self.type}")
        need(self.geometry[3] == 512, f"sectors of {self.geometry[3]} bytes")
        need(self.block and self.block & (self.block - 1) == 0, f"blocks of {self.block} bytes")
        need(self.size <= self.blocks * self.block, "more disk than blocks")
        need(self.data_offset >= self.map_offset + 4 * self.blocks, "the map reaches into the blocks")
        self.file.seek(self.map_offset)
        data = self.file.read(4 * self.blocks)
        need(len(data) == 4 * self.blocks, "the map is cut short")
        self.map = struct.unpack(f"<{self.blocks}I", data)

    def is_child(self):
        return self.type in (3, 4) or self.parent != NULL

    def place(self, entry):
        """Where a block's data lies in the file."""
        return self.data_offset + entry * (self.extra + self.block) + self.extra

    def read(self, block):
        """A block's bytes; None if it is free."""
        entry = self.map[block]
        if entry == FREE:
            return None
        if entry == ZERO:
            return bytes(self.block)
        self.file.seek(self.place(entry))
        data = self.file.read(self.block)
        need(len(data) == self.block, f"block {block} is cut short")
        return data


def find_parent(child, folders, raws):
    """The images with the parent's UUID; the one with its modification UUID is the parent."""
    if str(child.parent) in raws:
        return raws[str(child.parent)]
    found = []
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if not os.path.isfile(path) or os.path.samefile(path, child.path):
                continue
            try:
                image = Image(path)
            except (Broken, UnicodeDecodeError, struct.error):
                continue
            if image.uuid == child.parent:
                found.append(image)
    need(found, f"{child.path}: no image has the UUID {child.parent}")
    if child.parent_modification == NULL:
        return found[0]
    for image in found:
        if image.modification == child.parent_modification:
            return image
    raise Broken(f"{child.path}: {found[0].path} was changed: {found[0].modification}, not {child.parent_modification}")


def read_range(layer, below, offset, count):
    """What an image, with the layers below it, shows in a range."""
    if isinstance(layer, str):
        with open(layer, "rb") as file:
            file.seek(offset)
            return file.read(count).ljust(count, b"\0")
    result = b""
    while count > 0:
        start = offset % layer.block
        part = min(count, layer.block - start)
        if offset < layer.size:
            # Behind its end, within its last block too, an image shows zeros, whatever lies below.
            part = min(part, layer.size - offset)
        data = layer.read(offset // layer.block) if offset < layer.size else bytes(layer.block)
        if data is not None:
            result += data[start:start + part]
        elif below:
            result += read_range(below[0], below[1:], offset, part)
        else:
            result += bytes(part)
        offset, count = offset + part, count - part
    return result


def flatten(path, out, folders, raws):
    chain = [Image(path)]
    while isinstance(chain[-1], Image) and chain[-1].is_child():
        need(len(chain) < 100, "the chain is a circle")
        here = os.path.dirname(os.path.abspath(chain[-1].path))
        own = [here] + ([os.path.dirname(here)] if os.path.basename(here) == "Snapshots" else [])
        chain.append(find_parent(chain[-1], own + folders, raws))
    top = chain[0]
    size = top.size // 512 * 512
    with open(out, "wb") as file:
        for offset in range(0, size, 1 << 20):
            data = read_range(top, chain[1:], offset, min(1 << 20, size - offset))
            if data.strip(b"\0"):
                file.seek(offset)
                file.write(data)
        file.truncate(size)


def check(path, is_open):
    image = Image(path)
    entries = [entry for entry in image.map if entry < ZERO]
    need(len(set(entries)) == len(entries), "two blocks lie in one place")
    for entry in entries:
        need(image.place(entry) + image.block <= image.length, f"entry {entry} lies outside the file")
        # Other programs put the next block where the count says.
        need(entry < image.allocated, f"entry {entry} is not covered by the count {image.allocated}")
    need(image.allocated <= image.blocks, f"{image.allocated} of {image.blocks} blocks allocated")
    if image.type == 2:
        need(len(entries) == image.blocks, "a fixed image with free blocks")
    if is_open:
        return
    need(len(entries) == image.allocated, f"{len(entries)} entries, and a count of {image.allocated}")
    end = image.data_offset + image.allocated * (image.block + image.extra)
    need(image.length == end, f"the file has {image.length} bytes, and ends at {end}")


def make(options):
    """An image as the options say, its blocks in a random order."""
    with open(options.raw_disk, "rb") as file:
        disk = file.read()
    below = b""
    if options.over:
        with open(options.over, "rb") as file:
            below = file.read()
    block, extra = options.block, options.extra
    blocks = -(-len(disk) // block)
    kind = options.type
    wanted, entries = [], []
    for number in range(blocks):
        data = disk[number * block:(number + 1) * block].ljust(block, b"\0")
        under = below[number * block:(number + 1) * block].ljust(block, b"\0")
        if kind == 2 or data.strip(b"\0") and data != under:
            wanted.append((number, data))
            entries.append(None)
        else:
            entries.append(FREE if data == under else ZERO)
    order = list(range(len(wanted)))
    if kind != 2:
        random.Random(options.seed).shuffle(order)
    for (number, _), place in zip(wanted, order):
        entries[number] = place
    ids = [uuid.UUID(text) if text else uuid.uuid4() for text in (options.uuid, options.modification)]
    ids += [uuid.UUID(text) if text else NULL for text in (options.parent, options.parent_modification)]
    geometry = struct.pack("<IIII", 0, 0, 0, 512)
    comment = options.comment.encode().ljust(256, b"\0")
    head = bytearray(b"<<< a test's Virtual Disk Image >>>\n".ljust(64, b"\0"))
    size = len(disk) + options.odd
    if options.version == "1.1":
        map_offset = options.map_offset
        data_offset = -(-(map_offset + 4 * blocks) // options.align) * options.align
        head += struct.pack("<IIIII", SIGNATURE, 0x00010001, options.header, kind, options.flags) + comment
        head += struct.pack("<II", map_offset, data_offset) + geometry
        head += struct.pack("<IQIIII", 0, size, block, extra, blocks, len(wanted))
        head += b"".join(id.bytes_le for id in ids)
        if options.header >= 400:
            head += struct.pack("<IIII", 5, 6, 7, 512)
    else:
        map_offset, data_offset = 420, 420 + 4 * blocks
        head += struct.pack("<IIII", SIGNATURE, int(options.version.split(".")[1]), kind, options.flags) + comment
        head += geometry + struct.pack("<QIII", size, block, blocks, len(wanted))
        head += b"".join(id.bytes_le for id in ids[:3])
        extra = 0
    with open(options.out, "wb") as file:
        file.write(head)
        file.seek(map_offset)
        file.write(struct.pack(f"<{blocks}I", *entries))
        file.truncate(data_offset + len(wanted) * (block + extra))
        for (_, data), place in zip(wanted, order):
            file.seek(data_offset + place * (block + extra) + extra)
            file.write(data)


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("flatten")
    command.add_argument("image")
    command.add_argument("out")
    command.add_argument("--folder", action="append", default=[])
    command.add_argument("--raw", action="append", default=[])
    command = commands.add_parser("check")
    command.add_argument("image")
    command.add_argument("--open", action="store_true")
    command = commands.add_parser("info")
    command.add_argument("image")
    command = commands.add_parser("make")
    command.add_argument("raw_disk")
    command.add_argument("out")
    command.add_argument("--version", default="1.1")
    for name, default in (("header", 400), ("type", 1), ("block", 1 << 20), ("extra", 0), ("flags", 0), ("seed", 1),
                          ("odd", 0), ("align", 512), ("map-offset", 512)):
        command.add_argument(f"--{name}", type=int, default=default)
    for name in ("uuid", "modification", "parent", "parent-modification", "over", "comment"):
        command.add_argument(f"--{name}", default="")
    options = parser.parse_args()
    try:
        if options.command == "flatten":
            flatten(options.image, options.out, options.folder, dict(text.split("=", 1) for text in options.raw))
        elif options.command == "check":
            check(options.image, options.open)
        elif options.command == "make":
            make(options)
        else:
            image = Image(options.image)
            for name in ("major", "minor", "header_size", "type", "flags", "comment", "size", "block", "extra", "blocks",
                         "allocated", "uuid", "modification", "parent", "parent_modification", "map_offset",
                         "data_offset", "geometry", "bios"):
                print(f"{name}={getattr(image, name)}")
            print("free=%d\nzero=%d" % (image.map.count(FREE), image.map.count(ZERO)))
    except Broken as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
