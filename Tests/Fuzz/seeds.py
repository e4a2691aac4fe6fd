#!/usr/bin/env python3
"""Makes the first inputs of a fuzzer, in the form that it takes apart: images by qemu-img, or disks with partition tables
and file systems by their tools."""
import os
import struct
import subprocess
import sys
import tempfile


# What the fuzzer of changes does to each image, in place of the ways of using it that the others have.
CHANGES = (0, 8, 16, 24, 1, 9, 25, 2, 10, 18, 34, 66, 130, 3, 11, 4, 5, 13, 21, 29, 37, 45, 53, 109, 6, 7)
operations = None


def seed(folder, name, how, image, other=b""):
    numbers = (how,) if operations is None else operations if how == 0 else ()
    for number in numbers:
        with open(os.path.join(folder, name if operations is None else f"{name}-{number}"), "wb") as file:
            file.write(bytes([number]) + struct.pack("<I", len(image)) + image + other)


def images(folder):
    with tempfile.TemporaryDirectory() as work:
        raw = os.path.join(work, "raw")
        with open(raw, "wb") as file:
            file.write(b"\x11" * 70000 + b"\0" * 200000 + os.urandom(3000))
            file.truncate(1 << 20)
        for subformat in ["monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse"]:
            path = os.path.join(work, "a.vmdk")
            subprocess.run(["qemu-img", "convert", "-O", "vmdk", "-o", f"subformat={subformat}", raw, path], check=True)
            others = sorted(n for n in os.listdir(work) if n not in ("raw", "a.vmdk"))
            image = open(path, "rb").read()
            other = b""
            if others:
                other = open(os.path.join(work, others[0]), "rb").read()[:1 << 19]
                image = image.replace(others[0].encode(), b"b.vmdk" + b" " * 0)
            for how in (0, 1, 5, 7):
                seed(folder, f"{subformat}-{how}", how, image, other)
            for name in others + ["a.vmdk"]:
                os.remove(os.path.join(work, name))
        base = os.path.join(work, "b.vmdk")
        child = os.path.join(work, "a.vmdk")
        subprocess.run(["qemu-img", "convert", "-O", "vmdk", raw, base], check=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", "-b", "b.vmdk", "-F", "vmdk", child], check=True, cwd=work)
        for how in (0, 1, 3):
            seed(folder, f"child-{how}", how, open(child, "rb").read(), open(base, "rb").read())


def overlays(folder):
    """Scratch overlays over a raw disk, by the table in OverlayHeader.swift; the fuzzer puts the checksum in."""
    for shift, size in ((12, 64 << 10), (12, 200 << 10), (16, 256 << 10)):
        block = 1 << shift
        below = b"\x22" * size
        header = bytearray(4096)
        header[0:16] = b"vdmount overlay\0"
        data = max(2 * block, (4096 + -(-size // block) * 4 + block - 1) // block * block)
        struct.pack_into("<IIQQQ", header, 16, 1, shift, size, 4096, data)
        header[48:64] = os.urandom(16)
        struct.pack_into("<Q", header, 104, size)
        header[120:123] = b"raw"
        struct.pack_into("<H6s", header, 128, 6, b"b.vmdk")
        first = data >> shift
        table = struct.pack("<6I", first + 1, 0, 1, first, 0, first + 2)
        image = bytes(header) + table + bytes(data - 4096 - len(table)) + b"\x33" * (3 * block)
        for how in (0, 1, 3, 5, 7):
            seed(folder, f"overlay-{shift}-{size >> 10}-{how}", how, image, below)


def qed(folder):
    """QED images by qemu-img, closed and not closed, alone and over a raw disk; and one whose entries lead anywhere."""
    with tempfile.TemporaryDirectory() as work:
        image, base = os.path.join(work, "a.qed"), os.path.join(work, "b.vmdk")
        with open(base, "wb") as file:
            file.write(b"\x44" * 90000 + bytes(10400))
        content = open(base, "rb").read()
        for cluster, table in ((4096, 2), (4096, 16), (65536, 2)):
            for parent in ([], ["-b", "b.vmdk", "-F", "raw"]):
                options = f"cluster_size={cluster},table_size={table}"
                command = ["qemu-img", "create", "-q", "-f", "qed", "-o", options, *parent, image, "300k"]
                subprocess.run(command, check=True, cwd=work)
                subprocess.run(["qemu-io", "-f", "qed", "-c", "write -P 1 0 9k", "-c", "write -P 2 100k 20k", "-c",
                                "write -z 200k 64k", image], check=True, cwd=work, stdout=subprocess.DEVNULL)
                made = bytearray(open(image, "rb").read())
                name = f"qed-{cluster}-{table}-{len(parent)}"
                for how in (0, 1, 3, 5, 7):
                    seed(folder, f"{name}-{how}", how, bytes(made), content)
                made[16] |= 2
                l1 = struct.unpack_from("<Q", made, 40)[0]
                l2 = struct.unpack_from("<Q", made, l1)[0]
                struct.pack_into("<3Q", made, l2 + 24, len(made), l2, struct.unpack_from("<Q", made, l2)[0])
                for how in (0, 1, 5):
                    seed(folder, f"{name}-unclean-{how}", how, bytes(made), content)


def vhds(folder):
    """VHDs by qemu-img, and differencing ones (which it cannot make) by the tables in Sources/DiskFormats/VHD; the
    fuzzer puts the checksums in."""
    with tempfile.TemporaryDirectory() as work:
        raw, path = os.path.join(work, "raw"), os.path.join(work, "a.vhd")
        with open(raw, "wb") as file:
            file.write(b"\x11" * 70000 + b"\0" * 60000 + os.urandom(3000))
            file.truncate(139264)
        for subformat in ["dynamic", "fixed"]:
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={subformat}", raw, path],
                           check=True)
            image = open(path, "rb").read()
            if subformat == "dynamic":
                # Blocks of 2 MiB are more than a fuzzer wants to copy: the file may end before theirs does.
                image = image[:1536 + 512 + 512 + 139264]
            for how in (0, 1, 5, 7):
                seed(folder, f"vhd-{subformat}-{how}", how, image)
    for block, size in ((4096, 40 << 10), (16 << 10, 100 << 10), (64 << 10, 64 << 10)):
        count = -(-size // block)
        table = bytearray(b"\xff" * (-(-count * 4 // 512) * 512))
        first = 1536 + len(table) + 512
        blocks = b""
        for number in range(0, count, 2):
            struct.pack_into(">I", table, number * 4, (first + len(blocks)) // 512)
            blocks += bytes([0x3c, 0xff, 0, 1]).ljust(512, b"\0") + b"\x44" * block
        footer = bytearray(512)
        struct.pack_into(">8sIIQI4sI4sQQHBBI", footer, 0, b"conectix", 2, 0x10000, 512, 1, b"win ", 1, b"Wi2k", size, size,
                         4, 4, 17, 4)
        footer[68:84] = os.urandom(16)
        header = bytearray(1024)
        struct.pack_into(">8sQQIII", header, 0, b"cxsparse", (1 << 64) - 1, 1536, 0x10000, count, block)
        name = "b.vmdk"
        header[64:64 + 2 * len(name)] = name.encode("utf-16-be")
        locator = (".\\" + name).encode("utf-16-le")
        struct.pack_into(">4sIIIQ", header, 576, b"W2ru", 512, len(locator), 0, 1536 + len(table))
        image = bytes(footer + header + table) + locator.ljust(512, b"\0") + blocks + bytes(footer)
        for how in (0, 1, 3, 5, 7):
            seed(folder, f"vhd-child-{block >> 10}-{how}", how, image, b"\x22" * size)


def vhdx_pieces(image):
    """A VHDX as the fuzzer takes it: what is not zeros, of blocks a little."""
    result = b"pieces" + bytes([len(image) >> 20])
    for start in range(0, len(image), 4096):
        data = image[start:start + 4096].rstrip(b"\0")
        if data and (start < 4 << 20 or start % (1 << 20) == 0):
            result += struct.pack("<IH", start // 512, len(data)) + data
    return result


def vhdxs(folder):
    """VHDXs by qemu-img; from one of them a child, and one whose log is to be replayed, by the specification."""
    with tempfile.TemporaryDirectory() as work:
        raw, path = os.path.join(work, "raw"), os.path.join(work, "a.vhdx")
        with open(raw, "wb") as file:
            file.write(b"\x11" * 70000 + bytes(1 << 20) + os.urandom(3000))
            file.truncate(5 << 19)
        made = {}
        for name, options in (("dynamic", "block_size=1M,log_size=1M,block_state_zero=off"), ("zero", "block_size=1M"),
                              ("fixed", "block_size=1M,subformat=fixed")):
            subprocess.run(["qemu-img", "convert", "-O", "vhdx", "-o", options, raw, path], check=True)
            made[name] = open(path, "rb").read()
    base = bytearray(made["dynamic"])
    guid = bytes(range(1, 17))
    for header in (64 << 10, 128 << 10):
        base[header + 32:header + 48] = guid
    regions = {bytes(base[place:place + 4]): struct.unpack_from("<Q", base, place + 16)[0]
               for place in ((192 << 10) + 16, (192 << 10) + 48)}
    metadata, table = regions[bytes.fromhex("06a27c8b")], regions[bytes.fromhex("6677c22d")]
    child = bytearray(base)
    child[metadata + (64 << 10) + 4] |= 2
    texts = ["parent_linkage", "{04030201-0605-0807-090a-0b0c0d0e0f10}", "relative_path", ".\\b.vmdk"]
    words = [text.encode("utf-16-le") for text in texts]
    locator = bytes.fromhex("b7ef4ab09ed1814ab78925b8e9445913") + struct.pack("<HH", 0, 2)
    starts = [44 + sum(map(len, words[:number])) for number in range(4)]
    for number in (0, 2):
        locator += struct.pack("<IIHH", starts[number], starts[number + 1], len(words[number]), len(words[number + 1]))
    locator += b"".join(words)
    place = 80 << 10
    child[metadata + place:metadata + place + len(locator)] = locator
    child[metadata + 10] += 1
    entry = metadata + 32 * child[metadata + 10]
    child[entry:entry + 28] = (bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
                               + struct.pack("<III", place, len(locator), 4))
    # The first block is here in parts; behind all lies the bitmap.
    child[table] |= 7
    struct.pack_into("<Q", child, table + 4096 * 8, len(child) | 6)
    child += b"\x0f\xff".ljust(1 << 20, b"\0")
    unclean = bytearray(base)
    log = struct.unpack_from("<Q", unclean, (64 << 10) + 72)[0]
    for header in (64 << 10, 128 << 10):
        unclean[header + 48:header + 64] = guid
    page = bytes(unclean[table:table + 4096])
    unclean[table:table + 4096] = bytes(4096)
    for number, start in ((1, log), (2, log + 8192)):
        unclean[start:start + 64] = b"loge" + struct.pack("<IIIQII16sQQ", 0, 8192, 0, number, 2, 0, guid, 0, len(base))
        unclean[start + 64:start + 96] = b"zero" + struct.pack("<IQQQ", 0, 4096, table + 8192, number)
        unclean[start + 96:start + 128] = b"desc" + page[4092:] + page[:8] + struct.pack("<QQ", table, number)
        unclean[start + 4096:start + 8192] = b"data" + bytes(4) + page[8:4092] + struct.pack("<I", number)
    made.update(child=bytes(child), unclean=bytes(unclean))
    for name, image in made.items():
        for how in (0, 1, 3, 5, 7):
            seed(folder, f"vhdx-{name}-{how}", how, vhdx_pieces(image), vhdx_pieces(bytes(base)))


def vdis(folder):
    """VDIs of every kind, by the tests' own program, and one of qemu-img's; children lie over another."""
    reader = os.path.join(os.path.dirname(__file__), "..", "Readers", "vdi.py")
    ids = ["5f0c6e8e-91a6-4a71-9e5d-0b1c2d3e4f50", "6a1d7f9f-a2b7-4b82-8f6e-1c2d3e4f5061"]
    with tempfile.TemporaryDirectory() as work:
        raw, changed, base, image = (os.path.join(work, name) for name in ("raw", "changed", "b.vdi", "a.vdi"))
        content = b"\x11" * 30000 + bytes(40000) + os.urandom(20000) + bytes(10352)
        for path, data in ((raw, content), (changed, content[:25000] + bytes(20000) + content[45000:])):
            with open(path, "wb") as file:
                file.write(data)

        def make(*arguments):
            subprocess.run(["python3", reader, "make", *arguments], check=True)

        child = ["--over", raw, "--parent", ids[0]]
        make(raw, base, "--block", "8192", "--uuid", ids[0], "--modification", ids[1])
        below = open(base, "rb").read()
        for name, arguments in (
                ("dynamic", ["--block", "4096"]), ("small", ["--block", "512", "--align", "4"]),
                ("fixed", ["--block", "4096", "--type", "2"]), ("extra", ["--block", "4096", "--extra", "512"]),
                ("old", ["--block", "8192", "--version", "0.0"]), ("zero-expand", ["--block", "4096", "--flags", "256"]),
                ("child", ["--block", "4096", "--type", "4", *child, "--parent-modification", ids[1]]),
                ("old-child", ["--block", "16384", "--version", "0.1", "--type", "3", *child])):
            make(changed if "child" in name else raw, image, *arguments)
            for how in (0, 1, 3, 5, 7):
                seed(folder, f"vdi-{name}-{how}", how, open(image, "rb").read(), below)
        subprocess.run(["qemu-img", "create", "-q", "-f", "vdi", image, "2M"], check=True)
        for how in (0, 1, 5):
            seed(folder, f"vdi-empty-{how}", how, open(image, "rb").read())


def qcow2(folder):
    """QCOW2 and QCOW images by qemu-img: all kinds of entries, compressed clusters, snapshots, bitmaps, refcounts that
    are wrong; alone and over a raw disk."""
    kinds = [("v3", "cluster_size=4096", []), ("v2", "compat=0.10,cluster_size=4096", []),
             ("small", "cluster_size=512,refcount_bits=1", []), ("wide", "cluster_size=1024,refcount_bits=64", []),
             ("sub", "cluster_size=16k,extended_l2=on", []), ("meta", "cluster_size=4096,preallocation=metadata", []),
             ("zip", "cluster_size=4096", ["-c"]), ("zstd", "cluster_size=4096,compression_type=zstd", ["-c"])]
    with tempfile.TemporaryDirectory() as work:
        image, base, raw = (os.path.join(work, name) for name in ("a.qcow2", "b.vmdk", "raw"))
        for path in (base, raw):
            with open(path, "wb") as file:
                file.write(b"\x44" * 90000 + bytes(100000) + b"\x55" * 15000)
                file.truncate(300 << 10)
        content = open(base, "rb").read()

        def run(*command):
            subprocess.run(command, check=True, cwd=work, stdout=subprocess.DEVNULL)

        def keep(name, hows=(0, 1, 5)):
            data = open(image, "rb").read()
            assert len(data) < 560000, f"{name}: {len(data)} bytes"
            for how in hows:
                seed(folder, f"qcow2-{name}-{how}", how, data, content)

        writes = ["-c", "write -P 1 0 9k", "-c", "write -P 2 100k 20k", "-c", "write -z 200k 32k"]
        for name, options, extra in kinds:
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *extra, "-o", options, raw, image)
            run("qemu-io", "-f", "qcow2", *writes, image)
            keep(name)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "-b", "b.vmdk", "-F", "raw", image)
        run("qemu-io", "-f", "qcow2", *writes, image)
        keep("child", (0, 1, 3, 7))
        run("qemu-img", "snapshot", "-c", "one", image)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 3 8k 40k", image)
        run("qemu-img", "snapshot", "-c", "two", image)
        keep("snapshots")
        run("qemu-img", "bitmap", "--add", image, "changes")
        keep("bitmaps")
        for name, offset, bits in (("dirty", 79, 1), ("corrupt", 79, 2), ("autoclear", 95, 16)):
            with open(image, "r+b") as file:
                file.seek(offset)
                file.write(bytes([bits]))
            keep(name)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow", raw, image)
        keep("version1", (0, 5))


SECTOR = 512
TABLES = {
    "gpt": (["sfdisk", "-q", "DISK"], "label: gpt\nsize=10M,type=U\nsize=5M,name=two\n"),
    "parted": (["parted", "-s", "DISK", "mklabel", "gpt", "mkpart", "one", "1MiB", "9MiB"], ""),
    "few": (["sgdisk", "-S", "4", "-n", "1:0:+10M", "-n", "3:0:+5M", "DISK"], ""),
    "gpt4096": (["fdisk", "-b", "4096", "DISK"], "g\nn\n\n\n+10M\nn\n\n\n+5M\nw\n"),
    "mbr": (["sfdisk", "-q", "DISK"],
            "label: dos\nstart=2048,size=10M,type=83,bootable\nsize=30M,type=5\nsize=5M\nsize=5M\nsize=5M\n"),
    "mbr4096": (["fdisk", "-b", "4096", "DISK"], "o\nn\np\n1\n\n+10M\nn\ne\n2\n\n\nn\nl\n\n+10M\nn\nl\n\n+10M\nw\n"),
    "ext4": (["mkfs.ext4", "-q", "DISK"], ""),
    "ext2": (["mkfs.ext2", "-q", "-b", "1024", "DISK"], ""),
    "extmeta": (["mkfs.ext4", "-q", "-O", "^metadata_csum,^uninit_bg,meta_bg,^resize_inode,bigalloc", "DISK"], ""),
    "btrfs": (["mkfs.btrfs", "-q", "-m", "single", "-L", "label", "DISK"], ""),
    "fat12": (["mkfs.vfat", "-F", "12", "-n", "TWELVE", "DISK"], ""),
    "fat32": (["mkfs.vfat", "-F", "32", "-n", "BIG", "DISK"], ""),
    "exfat": (["mkfs.exfat", "-L", "label", "DISK"], ""),
    "ntfs": (["mkfs.ntfs", "-q", "-F", "-L", "label", "DISK"], ""),
    "f2fs": (["mkfs.f2fs", "-q", "-l", "label", "DISK"], ""),
    "swap": (["mkswap", "-L", "label", "DISK"], ""),
    "squashfs": (["mksquashfs", "/etc/apt", "DISK", "-noappend", "-quiet", "-no-progress"], ""),
    "iso": (["genisoimage", "-quiet", "-o", "DISK", "/etc/apt"], ""),
}


def pieces(content):
    """What is not zero, as the fuzzer wants it: a sector (with the top bit: from the end), a length, and the bytes."""
    count = len(content) // SECTOR
    runs = []
    for sector in range(count):
        data = content[sector * SECTOR:(sector + 1) * SECTOR]
        # Superblocks and tables are in front, and copies of tables at the end.
        if not data.strip(b"\0") or 300 < sector < count - 40 and len(runs) > 10:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) // SECTOR == sector and len(runs[-1][1]) < 60_000:
            runs[-1][1].extend(data)
        else:
            runs.append((sector, bytearray(data)))
    result = b""
    for sector, data in runs:
        place = sector if sector < count // 2 else (count - sector) | 1 << 31
        result += struct.pack("<IH", place, len(data.rstrip(b"\0"))) + data.rstrip(b"\0")
    return result


def partitions(folder):
    with tempfile.TemporaryDirectory() as work:
        disk = os.path.join(work, "disk")
        for name, (command, text) in TABLES.items():
            with open(disk, "wb") as file:
                file.truncate((4 if name == "fat12" else 114 if name == "btrfs" else 64) << 20)
            command = [disk if word == "DISK" else word for word in command]
            subprocess.run(command, input=text.encode(), check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
            content = open(disk, "rb").read()
            for how in (0, 1):
                with open(os.path.join(folder, f"{name}-{how}"), "wb") as file:
                    file.write(bytes([how]) + struct.pack("<I", len(content) // SECTOR) + pieces(content))


def caches(folder):
    """Block caches of 2 MiB with all of the fuzzer's disk in them, in one leaf or two; it puts the image's identity in."""
    content = bytes((i * 7 + (i >> 9)) & 255 for i in range(5 * 65536 + 1536))
    size, root, slots, chunk = 4096, 4, 60, 128
    for leaves in (0, 1, 2):
        extents = [(n * chunk, min(chunk, len(content) // 512 - n * chunk), slots + n * chunk) for n in range(6)]
        groups = {0: [[]], 1: [extents], 2: [extents[:4], extents[4:]]}[leaves]
        nodes = [root] if leaves < 2 else [root + 8, root + 16]
        place = [node for node, group in zip(nodes, groups) for _ in group]
        image = bytearray(512 * slots)
        for node, group in zip(nodes, groups):
            image[node * 512] = 2
            for index, (first, blocks, address) in enumerate(group):
                number = first // chunk
                before = place[number - 1] if number else 0
                after = place[number + 1] if number < 5 else 0
                struct.pack_into("<QQBBQIQ", image, node * 512 + 1 + 38 * index, before, after, 0, 0, first, blocks,
                                 address)
        if leaves == 2:
            image[root * 512] = 1
            for index, (node, group) in enumerate(zip(nodes, groups)):
                covered = group[-1][0] + group[-1][1] - group[0][0]
                struct.pack_into("<QIQ", image, root * 512 + 1 + 20 * index, group[0][0], covered, node)
        metadata = 4 + 8 * (3 if leaves == 2 else 1)
        data = len(content) // 512 if leaves else 0
        struct.pack_into("<4sIQBIQQI", image, 0, b"VCI\0", 1, size, 0, 1, root, 2, 2)
        struct.pack_into("<4sIQQQQ", image, 1024, b"VBLK", 1, size, size - metadata - data, metadata, data)
        for start, count in ((0, metadata), (slots, data)):
            for block in range(start, start + count):
                image[1536 + block // 8] |= 1 << block % 8
        image += content if leaves else b""
        for how in (0, 1, 3):
            with open(os.path.join(folder, f"cache-{leaves}-{how}"), "wb") as file:
                file.write(bytes([how]) + image)


def network(folder):
    """Answers of web servers, addresses, and messages of the process that reaches servers."""
    asked = struct.pack("<Q", 0)[:6] + struct.pack("<I", 65535)[:3]
    for name, status, text in (
            ("range", 1, "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-65535/1000000\r\nETag: \"a\"\r\n"),
            ("empty", 9, "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */0\r\n"),
            ("whole", 0, "HTTP/2 200\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\nETag: W/\"x\"\r\n"),
            ("later", 12, "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 120\r\nContent-Encoding: gzip\r\n")):
        for code in (0, 18):
            head = asked + bytes([code & 1, 1 - code & 1 or code, status]) + struct.pack("<I", 65536)[:3] + b"\0"
            with open(os.path.join(folder, f"http-{name}-{code}"), "wb") as file:
                file.write(b"\0" + head + text.encode())
    words = ["http://h/images/", "http://h/images/a/../b?c", "nbd+unix:///export?socket=/run/x", "..\\b.vmdk",
             "iscsi://me%secret@10.0.0.1:3260/iqn.2001-04.com.example:disk/1"]
    with open(os.path.join(folder, "addresses"), "wb") as file:
        file.write(b"\1" + b"\0".join(word.encode() for word in words))

    def message(code, flag=0, offset=0, length=0, data=b""):
        return struct.pack("<BBHIQQQ", code, flag, 0, 0, offset, length, len(data)) + data

    opened = message(0, data=b"\0".join([b"0", b"5000", b"w", b"d", b"-", b"http://h/x", b"1"]))
    failed = message(1, data=b"\0".join([b"system", b"5", b"77", b"a", b"it failed"]))
    reads = message(0, data=b"\1" * 3000) + message(0, 1, 100, 200)
    last = message(0, data=b"\2" * 100) + message(0) * 2
    for name, data in (("open", opened + reads + reads + last), ("failure", opened + failed * 4), ("refusal", failed)):
        for kind in (2, 3):
            with open(os.path.join(folder, f"messages-{name}-{kind}"), "wb") as file:
                file.write(bytes([kind]) + data)


if __name__ == "__main__":
    os.makedirs(sys.argv[2], exist_ok=True)
    every = [images, overlays, qed, vhds, vhdxs, vdis, qcow2]
    makers = {"fuzz": every, "fuzz-change": every, "fuzz-partitions": [partitions], "fuzz-cache": [caches],
              "fuzz-network": [network]}
    operations = CHANGES if sys.argv[1] == "fuzz-change" else None
    for make in makers[sys.argv[1]]:
        make(sys.argv[2])
