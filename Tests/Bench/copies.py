#!/usr/bin/env python3
"""Speed of `vdimg convert` and `vdimg merge` beside qemu-img and cp.

Each program makes the same image of the same file, in turns; the fastest of the rounds counts. New files take free
memory, which on a virtual machine may first have to come back from its host, so that much is taken and freed before each
turn. Unless a row says so, neither waits for stable storage (`vdimg convert --no-sync`; qemu-img and cp never do). Processor time and memory are those of ours.
It measures and compares with the targets; it does not fail.
"""
import argparse
import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time

from bench import FORMATS, GIB, MIB, machine_facts, number, parse_size, run, say, table_of, verdict, write_output

OURS, PEER, CP = "ours", "peer", "cp"
SECTOR, GRAIN = 512, 64 << 10


@dataclasses.dataclass
class Row:
    """One thing that is done by several programs. `commands`: by name, what is run; `new` are the files that makes."""

    title: str
    commands: dict
    new: tuple
    of_peer: float = None  # how many times as fast as the peer it must be
    of_cp: float = None
    limit: float = None  # seconds
    prepare: object = None
    seconds: dict = dataclasses.field(default_factory=dict)
    processor: float = 0
    memory: float = 0
    space: float = None

    def best(self, name):
        return min(self.seconds[name]) if self.seconds.get(name) else None

    def ratio(self, name):
        ours, other = self.best(OURS), self.best(name)
        return other / ours if ours and other else None


def measured(command):
    """Runs a shell command: seconds, seconds of processor, MiB at most in memory."""
    start = time.monotonic()
    process = subprocess.Popen(["/bin/sh", "-ec", command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    said = process.stderr.read().decode(errors="replace").strip()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command}: status {process.returncode}: {said}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def take_memory(size):
    """Takes memory and frees it: for a while it does not have to come back from a host that lends it."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


# ---- content ------------------------------------------------------------------------------------------------------


def in_process(work, *arguments):
    """Does it in a process of its own: what this one ever had in memory counts as that of those it starts."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{work.__name__} failed")


def write_data(path, size):
    """A disk of which every other 64 MiB hold bytes that cannot be compressed: `size` of them."""
    noise = random.Random(1).randbytes(16 * MIB)
    with open(path, "wb") as file:
        for start in range(0, size, 16 * MIB):
            piece = start // (16 * MIB)
            file.seek(start + start // (64 * MIB) * 64 * MIB)
            file.write(noise[piece * 4096:] + noise[:piece * 4096])
        file.truncate(2 * size)


def write_noise(path, size):
    source = random.Random(5)
    with open(path, "wb") as file:
        for start in range(0, size, 16 * MIB):
            file.write(source.randbytes(min(16 * MIB, size - start)))


def write_text(path, size):
    """Words in no order, which deflate makes about half as large."""
    source = random.Random(7)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 10))) for _ in range(8000)]
    text = " ".join(source.choices(words, k=3_000_000)).encode()[:16 * MIB]
    with open(path, "wb") as file:
        for start in range(0, size, 16 * MIB):
            turn = source.randrange(MIB)
            file.write((text[turn:] + text[:turn])[:min(16 * MIB, size - start)])


def write_half(path, size):
    """The second half of the first `size` bytes of a disk."""
    source = random.Random(9)
    with open(path, "r+b") as disk:
        disk.seek(size // 2)
        for start in range(size // 2, size, 16 * MIB):
            disk.write(source.randbytes(min(16 * MIB, size - start)))


def scatter_grains(path):
    """Puts the grains of a sparse VMDK in random order: what the disk shows is another then, as good as the first."""
    with open(path, "r+b") as file:
        header = file.read(SECTOR)
        capacity, grain_size = struct.unpack_from("<QQ", header, 12)
        (table_entries,) = struct.unpack_from("<I", header, 44)
        directories = struct.unpack_from("<QQ", header, 48)
        tables = -(-capacity // (grain_size * table_entries))
        order = None
        for directory in directories:
            if not directory:
                continue
            file.seek(directory * SECTOR)
            places = struct.unpack(f"<{tables}I", file.read(4 * tables))
            entries = []
            for place in places:
                file.seek(place * SECTOR)
                entries += struct.unpack(f"<{table_entries}I", file.read(4 * table_entries))
            used = [index for index, entry in enumerate(entries) if entry > 1]
            if order is None:
                order = [entries[index] for index in used]
                random.Random(3).shuffle(order)
            for index, entry in zip(used, order):
                entries[index] = entry
            for number_of_table, place in enumerate(places):
                first = number_of_table * table_entries
                file.seek(place * SECTOR)
                file.write(struct.pack(f"<{table_entries}I", *entries[first:first + table_entries]))


# ---- the rows -----------------------------------------------------------------------------------------------------


class Copies:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.vdimg = pathlib.Path(options.bin, "vdimg").resolve()
        self.rows = []

    def path(self, name):
        return self.folder / name

    def wants(self, title):
        return self.options.rows.search(title)

    def measure(self, row):
        """In turns; what one program made is removed before the next begins."""
        if not self.wants(row.title):
            return
        say(f"bench: {row.title}")
        for _ in range(self.options.rounds):
            for name, command in row.commands.items():
                self.remove(row.new)
                if row.prepare:
                    row.prepare()
                in_process(take_memory, 2 * self.options.size)
                seconds, processor, memory = measured(command)
                if name == OURS and seconds <= min(row.seconds.get(OURS, [seconds])):
                    row.processor, row.memory = processor, memory
                row.seconds.setdefault(name, []).append(seconds)
        self.remove(row.new)
        self.rows.append(row)

    def remove(self, paths):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def ours(self, source, target, options=""):
        return f"{self.vdimg} convert --quiet {options} {source} {target}"

    def source(self, format):
        """The disk in a format, as qemu-img makes it."""
        path = self.path(f"disk.{format}")
        if not path.exists():
            raw = self.path("disk.raw")
            if not raw.exists():
                in_process(write_data, raw, self.options.size)
            if format != "raw":
                FORMATS[format].convert(raw, path)
        return path

    def conversions(self):
        """Every format to every other, and the raw file to a raw file."""
        names = ["raw", *FORMATS]
        for source in names:
            for target in names:
                if source == target != "raw" or not self.wants(title := f"{source} to {target}"):
                    continue
                new = self.path(f"new.{target}")
                driver = FORMATS[target].driver if target in FORMATS else "raw"
                option = f"-o {FORMATS[target].qemu[0]}" if target in FORMATS and FORMATS[target].qemu[0] else ""
                old, raw = self.source(source), self.source("raw")
                commands = {
                    OURS: self.ours(old, new, f"--format {source} --to {target} --no-sync"),
                    PEER: f"qemu-img convert -f {FORMATS[source].driver if source in FORMATS else 'raw'} "
                          f"-O {driver} {option} {old} {new}",
                    CP: f"cp {raw} {new}",
                }
                self.measure(Row(title, commands, (new,), of_peer=1.3, of_cp=0.8))
            if source != "raw":
                self.remove([self.path(f"disk.{source}")])

    def synced(self):
        """The same, when all wait until what they made is on stable storage."""
        for source, target in [("raw", "raw"), ("raw", "qcow2"), ("qcow2", "vmdk")]:
            title = f"{source} to {target}, on stable storage"
            if not self.wants(title):
                continue
            new = self.path(f"new.{target}")
            old, raw = self.source(source), self.source("raw")
            self.measure(Row(title, {
                OURS: self.ours(old, new, f"--format {source} --to {target}"),
                PEER: f"qemu-img convert -f {source} -O {target} {old} {new}; sync -d {new}",
                CP: f"cp {raw} {new}; sync -d {new}",
            }, (new,), of_peer=1.3, of_cp=0.8))

    def compressed(self):
        stream = ("VMDK streamOptimized", "vmdk", "--to vmdk --variant stream", "-O vmdk -o subformat=streamOptimized")
        qcow2 = ("compressed QCOW2", "qcow2", "--to qcow2 --compress", "-c -O qcow2")
        for content, write, size in [
                ("random bytes", write_noise, self.options.size), ("text", write_text, self.options.size // 2)]:
            if not self.wants(content):
                continue
            raw, back = self.path("content.raw"), self.path("back.raw")
            in_process(write, raw, size)
            for name, suffix, ours, peer in (stream, qcow2):
                new, made = self.path(f"new.{suffix}"), self.path(f"made.{suffix}")
                self.measure(Row(f"{content} to {name}", {
                    OURS: self.ours(raw, new, f"--format raw {ours} --no-sync"),
                    PEER: f"qemu-img convert -f raw {peer} {raw} {new}",
                }, (new,), of_peer=8))
                run("qemu-img", "convert", "-f", "raw", *peer.split(), raw, made)
                self.measure(Row(f"{content} from {name} to raw", {
                    OURS: self.ours(made, back, "--to raw --no-sync"),
                    PEER: f"qemu-img convert -O raw {made} {back}",
                }, (back,), of_peer=3))
                self.remove([made])
            self.remove([raw])

    def merges(self):
        """A child that holds half as much as its parent, merged into it."""
        for format in ("vmdk", "qcow2", "vhdx"):
            title = f"merge of a {format} into its parent"
            if not self.wants(title):
                continue
            base, parent, child = self.path(f"base.{format}"), self.path(f"parent.{format}"), self.path(f"top.{format}")
            size = self.options.size
            run(self.vdimg, "create", "--quiet", "--format", format, "--size", 2 * size, base)
            run("qemu-io", "-f", FORMATS[format].driver, "-c", f"write -P 1 0 {size}", base)

            def prepare():
                shutil.copyfile(base, parent)
                run(self.vdimg, "create", "--quiet", "--parent", parent, child)
                mount = self.path("mount")
                mount.touch()
                run(self.vdimg.parent / "vdmount", "--rw", child, mount)
                in_process(write_half, mount, size)
                run(self.vdimg.parent / "vdumount", mount)

            commands = {OURS: f"{self.vdimg} merge --quiet {child}"}
            if format != "vhdx":  # QEMU's has no children
                commands[PEER] = f"qemu-img commit -q {child}; sync -d {parent}"
            self.measure(Row(title + ", on stable storage", commands, (parent, child), prepare=prepare))
            self.remove([base])

    # ---- file systems with reflinks

    def clones(self):
        """A VMDK on a file system with reflinks: grains in order, and scattered."""
        size = self.options.clone_size
        for kind in ("xfs", "btrfs"):
            if not self.wants(f"on {kind}"):
                continue
            with file_system(self.folder, kind, size * 3 + GIB) as folder:
                image, raw = folder / "disk.vmdk", folder / "disk.raw"
                in_process(write_noise, raw, size)
                run(self.vdimg, "convert", "--quiet", "--no-reflink", raw, image)
                os.unlink(raw)
                os.sync()
                time.sleep(3)  # XFS gives the space of a removed file back a little later
                for how, limit in (("grains in order", 2), ("grains scattered", 15)):
                    if how != "grains in order":
                        in_process(scatter_grains, image)
                    # In proportion, where less is measured than the 10 GiB that the targets speak of.
                    limit *= size / (10 * GIB)
                    for target in ("vhdx", "vdi", "raw"):
                        new = folder / f"new.{target}"
                        row = Row(f"{size // MIB} MiB of VMDK, {how}, to {target} on {kind}",
                                  {OURS: self.ours(image, new, f"--to {target}")}, (new,), limit=limit)
                        before = free_space(folder)
                        run("sh", "-ec", row.commands[OURS])
                        row.space = (before - free_space(folder)) / MIB
                        run("qemu-img", "compare", image, new)
                        self.measure(row)


def free_space(folder):
    os.sync()
    facts = os.statvfs(folder)
    return facts.f_bfree * facts.f_frsize


@contextlib.contextmanager
def file_system(folder, kind, size):
    image, mount = folder / f"{kind}.img", folder / kind
    with open(image, "wb") as file:
        file.truncate(size)
    run(f"mkfs.{kind}", "-q", image)
    mount.mkdir()
    run("mount", "-o", "loop", image, mount)
    try:
        yield mount
    finally:
        run("umount", mount)
        mount.rmdir()
        image.unlink()


# ---- what is said -------------------------------------------------------------------------------------------------


def tables(rows):
    def cells(row):
        return [row.title, *[number(row.best(name), ".2f") for name in (OURS, PEER, CP)],
                number(row.of_peer, "g"), verdict(row.ratio(PEER), row.of_peer),
                number(row.of_cp, "g"), verdict(row.ratio(CP), row.of_cp),
                number(row.processor, ".2f"), number(row.memory, ".0f")]

    limited = [[row.title, f"{row.limit:.3g}",
                f"{row.best(OURS):.2f} " + ("ok" if row.best(OURS) < row.limit else "**short**"),
                number(row.space, ".0f"), number(row.memory, ".0f")] for row in rows if row.limit]
    return "\n".join(
        table_of(["seconds", "ours", "qemu-img", "cp of the raw data", "of qemu-img: target", "measured",
                  "of cp: target", "measured", "processor", "MiB of memory"], 1,
                 [cells(row) for row in rows if not row.limit])
        + table_of(["clones", "limit, s", "measured", "MiB more on the medium", "MiB of memory"], 1, limited)).rstrip()


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measures vdimg convert and merge beside qemu-img and cp.")
    parser.add_argument("--bin", default=".build/release", help="where vdimg and vdmount are")
    parser.add_argument("--dir", default="/var/tmp", help="where the images go (about 12 times --size, 4 of --clone-size)")
    parser.add_argument("--size", type=parse_size, default=None, help="bytes of data (1G; with --quick 128M)")
    parser.add_argument("--clone-size", type=parse_size, default=None,
                        help="bytes of data where files share blocks (10G; with --quick 256M)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="little data: to see that it works")
    parser.add_argument("--parts", default="conversions,synced,compressed,merges,clones", help="which parts")
    parser.add_argument("--rows", type=lambda text: re.compile(text, re.I), default=re.compile(""), metavar="REGEX",
                        help="only the rows whose title matches")
    parser.add_argument("--output", metavar="FILE", help="also write the table into this file")
    options = parser.parse_args()
    options.size = options.size or (128 * MIB if options.quick else GIB)
    options.clone_size = options.clone_size or (256 * MIB if options.quick else 10 * GIB)
    return options


def main():
    options = parse_arguments()
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        sys.exit("bench: needs root, for mounts and loop devices")
    with tempfile.TemporaryDirectory(prefix="vdmount-bench.", dir=options.dir) as name:
        copies = Copies(options, pathlib.Path(name).resolve())
        for part in options.parts.split(","):
            getattr(copies, part)()
        where = machine_facts(name) + (
            f"\n- {options.size // MIB} MiB of data, from the page cache; {options.rounds} rounds in turn, the fastest")
    text = where + "\n\n" + tables(copies.rows)
    print(text)
    if options.output:
        write_output(options.output, text, "copies")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(f"bench: {error}")
