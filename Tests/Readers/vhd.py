#!/usr/bin/env python3
"""A second reader of VHD images, written from the format's description alone, to judge what the first one writes.

    vhd.py check [--closed] IMAGE...      is each image sound? one line a mistake
    vhd.py flatten TOP OUT [--base RAW]   writes what the chain of TOP shows; RAW stands for a base that is no VHD

Big endian. A footer of 512 bytes ends the file; images that grow have a copy of it in front, a header of 1024 bytes, a
table with the sector of each block, and blocks: a bitmap with a bit a sector, the first one in the highest bit, and data.
"""
import os
import struct
import sys

SECTOR = 512
ABSENT = 0xFFFFFFFF
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4


class Mistake(Exception):
    pass


def checksum(data, place):
    return ~(sum(data[:place]) + sum(data[place + 4:])) & 0xFFFFFFFF


class Footer:
    def __init__(self, data, what):
        if data[:8] != b"conectix":
            raise Mistake(f"{what}: no cookie")
        (self.features, version, self.header, self.time, self.creator, _, _, self.original, self.size, self.cylinders,
         self.heads, self.sectors, self.type, stored) = struct.unpack(">IIQI4sI4sQQHBBII", data[8:68])
        self.uuid = data[68:84]
        if stored != checksum(data, 64):
            raise Mistake(f"{what}: wrong checksum")
        if version != 0x10000 or not self.features & 2:
            raise Mistake(f"{what}: version {version:#x}, features {self.features:#x}")
        if any(data[85:]):
            raise Mistake(f"{what}: the reserved bytes are not zero")


class Image:
    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb")
        self.length = os.fstat(self.file.fileno()).st_size
        if self.length % SECTOR:
            raise Mistake(f"the file has {self.length} bytes")
        self.end = self.length - SECTOR
        self.footer = Footer(self.read(self.end, SECTOR), "footer")
        self.size = self.footer.size
        self.bitmaps = {}
        if self.footer.type == FIXED:
            self.block_size = 0
            if self.footer.header != 0xFFFFFFFFFFFFFFFF:
                raise Mistake("a fixed image with a header")
            return
        if self.read(0, SECTOR) != self.read(self.end, SECTOR):
            raise Mistake("the footer's copy differs from it")
        header = self.read(self.footer.header, 1024)
        if header[:8] != b"cxsparse" or header[8:16] != b"\xff" * 8:
            raise Mistake("header: no cookie")
        self.table, version, self.entries, self.block_size, stored = struct.unpack(">QIIII", header[16:40])
        if stored != checksum(header, 36) or version != 0x10000:
            raise Mistake("header: wrong checksum or version")
        self.parent_uuid = header[40:56]
        self.parent_name = header[64:576].decode("utf-16-be").split("\0")[0]
        self.locators = []
        for place in range(576, 768, 24):
            code, space, count, _, offset = struct.unpack(">4sIIIQ", header[place:place + 24])
            if code != b"\0\0\0\0":
                self.locators.append((code, self.read(offset, count).decode("utf-16-le"), offset, space))
        self.bitmap_size = -(-(self.block_size // SECTOR) // (8 * SECTOR)) * SECTOR
        needed = -(-self.size // self.block_size)
        if needed > self.entries:
            raise Mistake(f"the table has {self.entries} entries, {needed} are needed")
        self.blocks = struct.unpack(f">{needed}I", self.read(self.table, needed * 4))

    def read(self, offset, count):
        self.file.seek(offset)
        data = self.file.read(count)
        if len(data) != count:
            raise Mistake(f"the file ends before byte {offset + count}")
        return data

    def bitmap(self, number):
        if number not in self.bitmaps:
            start = self.blocks[number] * SECTOR
            self.bitmaps[number] = self.read(start, self.bitmap_size)
        return self.bitmaps[number]

    def check(self, is_closed):
        """Yields mistakes."""
        if self.footer.type == FIXED:
            if self.end != self.size:
                yield f"the file has {self.end} bytes of data, the disk {self.size}"
            return
        taken = [(0, SECTOR, "the footer's copy"), (self.end, self.length, "the footer"),
                 (self.footer.header, self.footer.header + 1024, "the header"),
                 (self.table, self.table + self.entries * 4, "the table")]
        if self.footer.type == DIFFERENCING:
            taken += [(offset, offset + space, f"the path {text}") for _, text, offset, space in self.locators]
        for number, sector in enumerate(self.blocks):
            if sector == ABSENT:
                continue
            start = sector * SECTOR
            taken.append((start, start + self.bitmap_size + self.block_size, f"block {number}"))
            used = self.block_size // SECTOR
            if self.footer.type == DYNAMIC:
                ones = self.bitmap(number)[:max(1, used // 8)]
                if ones.strip(b"\xff"):
                    yield f"the bitmap of block {number} is not all ones"
        taken.sort()
        for (_, end, what), (start, _, other) in zip(taken, taken[1:]):
            if start < end:
                yield f"{other} at {start} lies over {what}, which ends at {end}"
        if taken[-1][2] != "the footer":
            yield "something lies behind the footer"
        if is_closed and self.end - taken[-2][1] >= SECTOR:
            yield f"the footer at {self.end} is not right behind {taken[-2][2]}, which ends at {taken[-2][1]}"

    def sector(self, number):
        """512 bytes of the disk, or None: ask the parent."""
        offset = number * SECTOR
        if offset >= self.size:
            return bytes(SECTOR)
        if self.footer.type == FIXED:
            return self.read(offset, SECTOR)
        block, inside = divmod(offset, self.block_size)
        if self.blocks[block] == ABSENT:
            return None
        if self.footer.type == DIFFERENCING:
            bit = inside // SECTOR
            if not self.bitmap(block)[bit >> 3] & 0x80 >> (bit & 7):
                return None
        return self.read(self.blocks[block] * SECTOR + self.bitmap_size + inside, SECTOR)

    def parent(self):
        """The parent's file, by the paths that are recorded."""
        folder = os.path.dirname(self.path)
        names = {code: text.replace("\\", "/") for code, text, _, _ in self.locators}
        for code in (b"W2ru", b"W2ku"):
            path = os.path.join(folder, names.get(code, ""))
            if os.path.isfile(path):
                return path
        path = os.path.join(folder, self.parent_name)
        return path if os.path.isfile(path) else None


class Raw:
    def __init__(self, path):
        self.file = open(path, "rb")

    def sector(self, number):
        self.file.seek(number * SECTOR)
        return self.file.read(SECTOR).ljust(SECTOR, b"\0")


def chain(path, base):
    images = [Image(path)]
    while images[-1].footer.type == DIFFERENCING:
        child = images[-1]
        if base and (not child.parent() or not child.parent().endswith(".vhd")):
            return images + [Raw(base)]
        if not child.parent():
            raise Mistake(f"{child.path}: the parent is not found")
        images.append(Image(child.parent()))
        if images[-1].footer.uuid != child.parent_uuid:
            raise Mistake(f"{child.path}: the parent has another UUID")
    return images


def flatten(path, out, base):
    images = chain(path, base)
    with open(out, "wb") as target:
        target.truncate(images[0].size)
        for number in range(images[0].size // SECTOR):
            for image in images:
                data = image.sector(number)
                if data is not None:
                    break
            if data and data.strip(b"\0"):
                target.seek(number * SECTOR)
                target.write(data)


def main(words):
    command, words = words[0], words[1:]
    if command == "flatten":
        flatten(words[0], words[1], words[3] if words[2:3] == ["--base"] else None)
        return 0
    is_closed = "--closed" in words
    status = 0
    for path in words:
        if path.startswith("--"):
            continue
        try:
            mistakes = list(Image(path).check(is_closed))
        except (Mistake, UnicodeDecodeError) as error:
            mistakes = [str(error)]
        for mistake in mistakes:
            print(f"{path}: {mistake}")
            status = 1
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Mistake as error:
        sys.exit(f"vhd.py: {error}")
