#!/usr/bin/env python3
"""A second reader of VHDX images, written from the format's description alone, to judge what the first one writes.

    vhdx.py check [--closed] IMAGE...     is each image sound? one line a mistake
    vhdx.py flatten TOP OUT [--base RAW]  writes what the chain of TOP shows; RAW stands for a base that is no VHDX

Little endian, GUIDs in the order of Windows. What a log still has to change is changed in memory.
"""
import os
import struct
import sys
import uuid

MIB = 1 << 20
SECTOR = 4096
NULL = uuid.UUID(int=0)
BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
ITEMS = {
    uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b"): "parameters",
    uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8"): "size",
    uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746"): "id",
    uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f"): "logical",
    uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556"): "physical",
    uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"): "locator",
}
LOCATOR = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
ABSENT, UNDEFINED, ZERO, UNMAPPED, FULL, PARTIAL = 0, 1, 2, 3, 6, 7

CRC = []
for number in range(256):
    for _ in range(8):
        number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
    CRC.append(number)


class Mistake(Exception):
    pass


def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ CRC[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def has_right_checksum(data):
    return struct.unpack_from("<I", data, 4)[0] == crc32c(data[:4] + bytes(4) + data[8:])


def guid(data, place):
    return uuid.UUID(bytes_le=bytes(data[place:place + 16]))


class Image:
    def __init__(self, path):
        self.path = path
        self.file = open(path, "rb")
        self.length = os.fstat(self.file.fileno()).st_size
        self.changes = {}
        if self.read(0, 8) != b"vhdxfile":
            raise Mistake("no file identifier")
        self.headers = [header for header in map(self.header, (64 << 10, 128 << 10)) if header]
        if not self.headers:
            raise Mistake("no header is valid")
        header = max(self.headers, key=lambda header: header[0])
        self.sequence, self.file_write, self.data_write, self.log_guid, self.log = header
        self.entries_in_log = 0
        if self.log_guid != NULL:
            self.replay()
        self.read_regions()
        self.read_metadata()
        self.read_table()

    def read(self, offset, count):
        """Bytes of the file, as they are after the log."""
        self.file.seek(offset)
        data = bytearray(self.file.read(count).ljust(count, b"\0"))
        if offset + count > self.length:
            raise Mistake(f"the file ends before byte {offset + count}")
        for page in range(offset // SECTOR, (offset + count - 1) // SECTOR + 1):
            if page in self.changes:
                start, end = max(offset, page * SECTOR), min(offset + count, (page + 1) * SECTOR)
                data[start - offset:end - offset] = self.changes[page][start - page * SECTOR:end - page * SECTOR]
        return bytes(data)

    def header(self, offset):
        data = self.read(offset, SECTOR)
        if data[:4] != b"head" or not has_right_checksum(data):
            return None
        sequence, = struct.unpack_from("<Q", data, 8)
        log_version, version, length, start = struct.unpack_from("<HHIQ", data, 64)
        if version != 1 or log_version != 0 or length % MIB or start % MIB or not length or not start:
            raise Mistake(f"header at {offset}: versions {version}, {log_version}, log {start}+{length}")
        return sequence, guid(data, 16), guid(data, 32), guid(data, 48), (start, length)

    # ---- the log

    def log_sector(self, place):
        start, length = self.log
        return self.read(start + place % length, SECTOR)

    def log_entry(self, place):
        """The entry there: (sequence, tail, length, flushed, last, changes), or None."""
        first = self.log_sector(place)
        if first[:4] != b"loge":
            return None
        length, tail, sequence, count, _ = struct.unpack_from("<IIQII", first, 8)
        flushed, last = struct.unpack_from("<QQ", first, 48)
        if guid(first, 32) != self.log_guid or not sequence or length % SECTOR or not 0 < length <= self.log[1]:
            return None
        data = b"".join(self.log_sector(place + step) for step in range(0, length, SECTOR))
        if not has_right_checksum(data):
            return None
        data_place = -(-(64 + 32 * count) // SECTOR) * SECTOR
        changes = []
        for number in range(count):
            kind, trailing, leading, offset, stamp = struct.unpack_from("<4s4s8sQQ", data, 64 + 32 * number)
            if stamp != sequence or offset % SECTOR:
                return None
            if kind == b"zero":
                zeros, = struct.unpack("<Q", leading)
                changes += [(page, bytes(SECTOR)) for page in range(offset // SECTOR, (offset + zeros) // SECTOR)]
                continue
            sector = data[data_place:data_place + SECTOR]
            data_place += SECTOR
            high, low = struct.unpack_from("<I", sector, 4)[0], struct.unpack_from("<I", sector, 4092)[0]
            if kind != b"desc" or sector[:4] != b"data" or high << 32 | low != sequence:
                return None
            changes.append((offset // SECTOR, leading + sector[8:4092] + trailing))
        return sequence, tail, length, flushed, last, changes

    def replay(self):
        best = None
        for start in range(0, self.log[1], SECTOR):
            run, place = [], start
            while place - start < self.log[1]:
                entry = self.log_entry(place)
                if not entry or run and entry[0] != run[-1][1][0] + 1:
                    break
                run.append((place % self.log[1], entry))
                place += entry[2]
            if not run:
                continue
            head = run[-1][1]
            places = [place for place, _ in run]
            if head[1] in places and (not best or head[0] > best[-1][0]):
                best = [entry for _, entry in run[places.index(head[1]):]]
        if not best:
            raise Mistake("the log has a GUID, and no entry that could be replayed")
        _, _, _, flushed, last, _ = best[-1]
        if flushed > self.length:
            raise Mistake(f"the file had {flushed} bytes by its log, it has {self.length}")
        self.length = max(self.length, -(-last // MIB) * MIB)
        self.entries_in_log = len(best)
        for entry in best:
            self.changes.update(entry[5])

    # ---- regions and metadata

    def read_regions(self):
        copies = [self.read(offset, 64 << 10) for offset in (192 << 10, 256 << 10)]
        whole = [data for data in copies if data[:4] == b"regi" and has_right_checksum(data)]
        if not whole:
            raise Mistake("no region table is valid")
        self.region_copies = len(whole) if whole[0] == whole[-1] else 1
        count, = struct.unpack_from("<I", whole[0], 8)
        self.regions = {}
        for number in range(count):
            place = 16 + 32 * number
            start, length, required = struct.unpack_from("<QII", whole[0], place + 16)
            kind = guid(whole[0], place)
            if required & 1 and kind not in (BAT, METADATA) or start % MIB or length % MIB or kind in self.regions:
                raise Mistake(f"region {kind}: {start}+{length}, required {required}")
            self.regions[kind] = (start, length)

    def read_metadata(self):
        start, length = self.regions[METADATA]
        table = self.read(start, 64 << 10)
        if table[:8] != b"metadata":
            raise Mistake("no metadata table")
        count, = struct.unpack_from("<H", table, 10)
        items = {}
        for number in range(count):
            place = 32 + 32 * number
            offset, size, flags = struct.unpack_from("<III", table, place + 16)
            name = ITEMS.get(guid(table, place))
            if not name and flags & 4 or offset < 64 << 10 or offset + size > length:
                raise Mistake(f"metadata item {guid(table, place)}: {offset}+{size}, flags {flags}")
            if name:
                items[name] = self.read(start + offset, size)
        self.block_size, flags = struct.unpack("<II", items["parameters"])
        self.is_fixed, self.has_parent = bool(flags & 1), bool(flags & 2)
        self.size, = struct.unpack("<Q", items["size"])
        self.sector_size, = struct.unpack("<I", items["logical"])
        self.disk_id = guid(items["id"], 0)
        if self.size % self.sector_size or self.sector_size not in (512, 4096):
            raise Mistake(f"{self.size} bytes in sectors of {self.sector_size}")
        if self.block_size & self.block_size - 1 or not MIB <= self.block_size <= 256 * MIB:
            raise Mistake(f"blocks of {self.block_size}")
        self.keys = {}
        if self.has_parent:
            locator = items["locator"]
            if guid(locator, 0) != LOCATOR:
                raise Mistake("the parent locator is of another type")
            for number in range(struct.unpack_from("<H", locator, 18)[0]):
                key, value, key_size, value_size = struct.unpack_from("<IIHH", locator, 20 + 12 * number)
                self.keys[locator[key:key + key_size].decode("utf-16-le")] = (
                    locator[value:value + value_size].decode("utf-16-le"))

    # ---- blocks

    def read_table(self):
        self.ratio = (1 << 23) * self.sector_size // self.block_size
        self.blocks = -(-self.size // self.block_size)
        chunks = -(-self.blocks // self.ratio)
        count = chunks * (self.ratio + 1) if self.has_parent else self.blocks + (self.blocks - 1) // self.ratio
        start, length = self.regions[BAT]
        if count * 8 > length:
            raise Mistake(f"the table has room for {length // 8} entries, {count} are needed")
        self.table = struct.unpack(f"<{count}Q", self.read(start, count * 8))
        self.bitmaps = {}

    def payload(self, block):
        entry = self.table[block + block // self.ratio]
        return entry & 7, entry >> 20 << 20

    def bitmap_entry(self, chunk):
        entry = self.table[(chunk + 1) * (self.ratio + 1) - 1]
        return entry & 7, entry >> 20 << 20

    def is_here(self, block, sector):
        """Whether a sector of a partially present block is in this image."""
        chunk, number = divmod(block, self.ratio)
        if chunk not in self.bitmaps:
            state, place = self.bitmap_entry(chunk)
            if state != FULL:
                raise Mistake(f"block {block} is here in parts, and its bitmap is in state {state}")
            self.bitmaps[chunk] = self.read(place, MIB)
        bit = number * (self.block_size // self.sector_size) + sector
        return self.bitmaps[chunk][bit >> 3] >> (bit & 7) & 1

    def check(self, is_closed):
        """Yields mistakes."""
        if is_closed and (self.log_guid != NULL or len(self.headers) < 2 or self.region_copies < 2):
            yield f"log {self.log_guid}, {len(self.headers)} headers, {self.region_copies} region tables"
        if is_closed and self.length % MIB:
            yield f"the file has {self.length} bytes"
        taken = [(0, MIB, "the header section"), (self.log[0], sum(self.log), "the log")]
        taken += [(start, start + length, f"region {kind}") for kind, (start, length) in self.regions.items()]
        for block in range(self.blocks):
            state, place = self.payload(block)
            if state in (FULL, PARTIAL):
                taken.append((place, place + self.block_size, f"block {block}"))
            elif state > UNMAPPED or self.is_fixed:
                yield f"block {block} is in state {state}"
            if state == PARTIAL:
                if not self.has_parent:
                    yield f"block {block} is here in parts, in a base"
                    continue
                bits = [self.is_here(block, sector) for sector in range(self.block_size // self.sector_size)]
                if not any(bits):
                    yield f"block {block} is here in parts, and no sector is"
        if self.has_parent:
            for chunk in range(-(-self.blocks // self.ratio)):
                state, place = self.bitmap_entry(chunk)
                if state == FULL:
                    taken.append((place, place + MIB, f"bitmap {chunk}"))
                elif state:
                    yield f"bitmap {chunk} is in state {state}"
        taken.sort()
        for (_, end, what), (start, _, other) in zip(taken, taken[1:]):
            if start < end:
                yield f"{other} at {start} lies over {what}, which ends at {end}"
        if taken[-1][1] > self.length:
            yield f"{taken[-1][2]} ends at {taken[-1][1]}, the file at {self.length}"
        if is_closed and not self.is_fixed and taken[-1][1] < self.length:
            yield f"the file goes on after {taken[-1][2]} at {taken[-1][1]}: it has {self.length}"

    def runs(self):
        """Yields (offset, data) of the disk; data None: ask the parent."""
        for block in range(self.blocks):
            offset = block * self.block_size
            length = min(self.block_size, self.size - offset)
            state, place = self.payload(block)
            if state == FULL:
                yield offset, self.read(place, length)
            elif state == PARTIAL:
                data = self.read(place, length)
                for sector in range(length // self.sector_size):
                    start = sector * self.sector_size
                    here = self.is_here(block, sector)
                    yield offset + start, data[start:start + self.sector_size] if here else self.sector_size
            elif state == ABSENT:
                yield offset, length
            else:
                yield offset, bytes(length)

    def parent(self):
        """The parent's file, by the paths that are recorded."""
        folder = os.path.dirname(self.path)
        for key in ("relative_path", "absolute_win32_path"):
            path = os.path.join(folder, self.keys.get(key, "").replace("\\", "/"))
            if os.path.isfile(path):
                return path
        return None


def chain(path, base):
    images = [Image(path)]
    while images[-1].has_parent:
        child = images[-1]
        parent = child.parent()
        if base and (not parent or not parent.endswith(".vhdx")):
            return images, base
        if not parent:
            raise Mistake(f"{child.path}: the parent is not found")
        images.append(Image(parent))
        if uuid.UUID(child.keys["parent_linkage"]) != images[-1].data_write:
            raise Mistake(f"{child.path}: the parent has another data-write GUID")
        if child.disk_id != images[-1].disk_id:
            raise Mistake(f"{child.path}: the parent has another disk ID")
    return images, None


def flatten(path, out, base):
    images, base = chain(path, base)
    size = images[0].size
    with open(out, "w+b") as target:
        if base:
            with open(base, "rb") as source:
                target.write(source.read(size))
        for image in reversed(images):
            # Behind a layer's end there is nothing, whatever lies below.
            target.truncate(image.size)
            for offset, data in image.runs():
                # (A number: so many bytes are the parent's, which are there already.)
                if offset < size and isinstance(data, bytes):
                    target.seek(offset)
                    target.write(data[:size - offset])
        target.truncate(size)


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
        except (Mistake, UnicodeDecodeError, KeyError, struct.error) as error:
            mistakes = [str(error)]
        for mistake in mistakes:
            print(f"{path}: {mistake}")
            status = 1
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Mistake as error:
        sys.exit(f"vhdx.py: {error}")
