#!/usr/bin/env python3
"""Speed and memory of vdmount, beside the limit (a bare libfuse pass-through) and qemu-storage-daemon.

All three serve the same content from the page cache; fio reads and writes with O_DIRECT, in turns (ours, limit, QEMU,
ours, ...), and each number is the median of its rounds; of writes into new images it is the fastest round, since those
take fresh memory, which on a virtual machine may first have to come back from its host. It measures and compares with the targets; it does not fail.
"""
import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
OURS, LIMIT, QEMU = "ours", "limit", "qemu"
# What another format is held against: ours, with the same content in a VMDK.
VMDK = "vmdk"
START_SECONDS = 30


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(*command):
    """Runs a command to its end; what it said goes into the error if it failed."""
    result = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip()
        raise RuntimeError(f"{' '.join(map(str, command))}: status {result.returncode}: {said}")
    return result.stdout


# ---- the formats --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Format:
    """A format as vdimg calls it, and how images of it are made."""

    name: str
    driver: str  # what QEMU calls it
    content: str = ""  # qemu-img's options for the image with content
    ours: tuple = ()  # vdimg's options for a new one
    qemu: tuple = ("",)  # qemu-img's options for new ones: the best of them counts
    # Whether the image with content is made by us: qemu-img lets data begin at odd sectors, where each page that is
    # written touches two of the file, whoever writes it.
    is_laid_out_by_us: bool = False

    def convert(self, source, image):
        run("qemu-img", "convert", "-O", self.driver, *option(self.content), source, image)


def option(text):
    return ["-o", text] if text else []


FORMATS = {format.name: format for format in [
    Format("vmdk", "vmdk", "subformat=monolithicSparse", (), ("subformat=monolithicSparse",)),
    Format("vdi", "vdi", is_laid_out_by_us=True),
    Format("vhd", "vpc", "", (), ("subformat=dynamic,force_size=on",), is_laid_out_by_us=True),
    Format("vhdx", "vhdx", "", (), ("", "block_state_zero=off", "block_size=1M,block_state_zero=off")),
    Format("qed", "qed"),
    Format("qcow2", "qcow2", "", (), ("", "lazy_refcounts=on", "preallocation=metadata", "extended_l2=on")),
]}


def format_of(image):
    return FORMATS[pathlib.Path(image).suffix[1:]]


# ---- the contenders: each serves an image as a file, in a process of its own --------------------------------------


class Contender:
    """A daemon that stays in the foreground. `command` answers how it is started, `file` where the disk appears."""

    name = ""
    is_folder = False

    def __init__(self, bench, image, writable=True):
        self.bench, self.image, self.writable = bench, pathlib.Path(image), writable
        self.mountpoint = bench.new_path("mnt")
        self.process = None

    @property
    def file(self):
        return self.mountpoint / "disk.raw" if self.is_folder else self.mountpoint

    def __enter__(self):
        if self.is_folder:
            self.mountpoint.mkdir()
        else:
            self.mountpoint.touch()
        log = self.bench.new_path("log")
        with open(log, "wb") as stderr:
            self.process = subprocess.Popen([str(word) for word in self.command()], stdin=subprocess.DEVNULL,
                                            stdout=stderr, stderr=stderr, start_new_session=True)
        try:
            self.wait_until_ready(log)
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_ready(self, log):
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not serve {self.image.name}: {log.read_text().strip()}")
            time.sleep(0.01)

    def is_ready(self):
        try:
            return self.file.stat().st_dev != self.bench.directory.stat().st_dev and self.file.stat().st_size > 0
        except OSError:
            return False

    def __exit__(self, *_):
        """A clean close; a hard one if that takes too long."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                say(f"bench: {self.name} did not end within a minute; killed")
                self.process.kill()
                self.process.wait()
        unmount(self.mountpoint)
        if self.is_folder:
            self.mountpoint.rmdir()
        else:
            self.mountpoint.unlink()


class Ours(Contender):
    name, is_folder = OURS, True

    def command(self):
        access = ["--rw"] if self.writable else []
        return [self.bench.vdmount, "--foreground", *access, self.image, self.mountpoint]


class Cached(Ours):
    """Ours, reading through a block cache."""

    def __init__(self, bench, image, cache):
        super().__init__(bench, image, writable=False)
        self.cache = cache

    def command(self):
        return [self.bench.vdmount, "--foreground", "--cache", self.cache, self.image, self.mountpoint]


class Slow(Contender):
    """A raw file as on a disk that takes 5 ms more for each read."""

    name = "slow"

    def command(self):
        return [self.bench.passthrough, self.image, self.mountpoint, "5000"]


class Limit(Contender):
    name = LIMIT

    def command(self):
        return [self.bench.passthrough, self.image, self.mountpoint]


class Qemu(Contender):
    name = QEMU

    def command(self):
        driver = format_of(self.image).driver
        image = f"driver={driver},node-name=disk,file.driver=file,file.filename={self.image}"
        if not self.writable:
            image += ",read-only=on,force-share=on"
        access = "on" if self.writable else "off"
        return ["qemu-storage-daemon", "--blockdev", image, "--export",
                f"type=fuse,id=e,node-name=disk,mountpoint={self.mountpoint},writable={access},growable=off"]


CONTENDERS = {OURS: Ours, LIMIT: Limit, QEMU: Qemu}


def unmount(path):
    """Takes away what is left of a mount, should its daemon have died."""
    mounted = any(line.split(" ")[4] == str(path) for line in open("/proc/self/mountinfo", encoding="utf-8"))
    if mounted:
        subprocess.run(["umount", "-l", str(path)], stdin=subprocess.DEVNULL, check=False)


@contextlib.contextmanager
def loop_device(path):
    device = run("losetup", "--find", "--show", "--direct-io=on", path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


# ---- fio ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Workload:
    title: str
    pattern: str
    block: str
    depth: int

    @property
    def unit(self):
        return "MiB/s" if self.block == "1m" else "kIOPS"


RANDOM_READS = [
    Workload("random read 4 KiB, one at a time", "randread", "4k", 1),
    Workload("random read 4 KiB, 32 deep", "randread", "4k", 32),
]
FIRST_SIX = [
    *RANDOM_READS,
    Workload("sequential read 1 MiB", "read", "1m", 1),
    Workload("random write 4 KiB over allocated blocks, one at a time", "randwrite", "4k", 1),
    Workload("random write 4 KiB over allocated blocks, 32 deep", "randwrite", "4k", 32),
    Workload("sequential write 1 MiB over allocated blocks", "write", "1m", 1),
]
NEW_SEQUENTIAL = Workload("sequential write 1 MiB into a new sparse image, fsync at the end", "write", "1m", 1)
NEW_RANDOM = Workload("random write 4 KiB into a new sparse image, fsync at the end", "randwrite", "4k", 32)


def fio(path, workload, size, *options):
    """The rate: thousands of requests a second, or MiB a second for the 1 MiB workloads."""
    answer = run("fio", "--name=bench", f"--filename={path}", "--direct=1", "--ioengine=libaio", "--thread",
                 f"--rw={workload.pattern}", f"--bs={workload.block}", f"--iodepth={workload.depth}",
                 f"--size={size}", "--allow_file_create=0", "--randrepeat=0", "--output-format=json", *options)
    job = json.loads(answer[answer.index("{"):])["jobs"][0]
    side = job["write" if "write" in workload.pattern else "read"]
    return side["bw_bytes"] / MIB if workload.unit == "MiB/s" else side["iops"] / 1000


# ---- the rows of the table ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """What was measured under one title: a list of rounds for each contender, and the targets it is held against."""

    title: str
    unit: str
    of_limit: float | None = None
    of_qemu: float | None = None
    # Of another format than VMDK: the part of VMDK's speed that it must have.
    of_vmdk: float | None = None
    # A row without a unit is a ratio of its own: what ours keeps of its own speed.
    kept_target: float | None = None
    # Whether the fastest round counts instead of the middle one.
    is_fastest: bool = False
    rates: dict = dataclasses.field(default_factory=dict)

    def add(self, name, rate):
        self.rates.setdefault(name, []).append(rate)

    def rate(self, name):
        rounds = self.rates.get(name)
        return (max if self.is_fastest else statistics.median)(rounds) if rounds else None

    def ratio(self, other):
        mine, its = self.rate(OURS), self.rate(other)
        return mine / its if mine and its else None


CACHE_TITLE = "that hits a block cache, of a local raw image through the same mount"
SLOW_TITLE = "block cache: random read 4 KiB of a disk of 5 ms a read, the second time, of the first"
LOOP_TITLE = "losetup --direct-io=on, geometric mean of the first six"
LOOP_NOTE = ("Over the raw file, the loop device goes past the page cache to the file system's own disk; on a tmpfs "
             "(`--dir /dev/shm`) both stay in memory.")

FIRST_SIX_TARGETS = [(0.93, 1.9), (0.9, 3.5), (0.93, 1.6), (0.9, 1.7), (0.9, 3.0), (0.93, 1.3)]


class Bench:
    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.count = 0
        self.bin = pathlib.Path(options.bin).resolve()
        self.vdmount, self.vdumount, self.vdimg = (self.bin / name for name in ("vdmount", "vdumount", "vdimg"))
        self.passthrough = directory / "passthrough"
        self.rows, self.facts, self.raw = [], [], {}
        self.names = [name for name in CONTENDERS if name in options.contenders]

    def new_path(self, kind):
        self.count += 1
        return self.directory / f"{kind}{self.count}"

    # -- content --

    def prepare(self):
        """A raw disk of random bytes, and for each contender an image of its own with that content."""
        if LIMIT in self.names or self.wanted(SLOW_TITLE):
            flags = run("pkg-config", "--cflags", "--libs", "fuse3").split()
            run("cc", "-O2", "-o", self.passthrough, HERE / "passthrough.c", *flags, "-pthread")
        say(f"bench: preparing a disk of {self.options.size // MIB} MiB in {self.directory}")
        self.raw_image, self.base = self.directory / "content.raw", self.directory / "base.vmdk"
        with open(self.raw_image, "wb") as file:
            for _ in range(self.options.size // (4 * MIB)):
                file.write(os.urandom(4 * MIB))
        FORMATS[VMDK].convert(self.raw_image, self.base)

    def image(self, name):
        """A copy of the content for one contender to write to."""
        source = self.raw_image if name == LIMIT else self.base
        copy = self.directory / f"{name}{source.suffix}"
        if not copy.exists():
            run("cp", "--reflink=never", "--sparse=never", source, copy)
            run("sync", "-f", copy)
        return copy

    def warm(self, *paths):
        """Into the page cache, in pages of 4 KiB.

        Where the file system keeps large folios (ext4 since Linux 6.16), what a file has of them depends on how the
        program wrote that made it, and small writes to them take many times as long, whoever writes. So each file is
        copied by writes of a page.
        """
        for path in paths:
            copy = path.with_name(path.name + ".copy")
            with open(path, "rb", buffering=0) as source, open(copy, "wb", buffering=0) as target:
                while piece := source.read(4 * MIB):
                    for start in range(0, len(piece), 4096):
                        target.write(piece[start:start + 4096])
                os.fsync(target.fileno())
            shutil.copystat(path, copy)
            copy.replace(path)

    def timed(self, path, workload):
        # What the round before wrote must not be written back during this one.
        run("sync", "-f", self.directory)
        ramp = [] if self.options.quick else ["--ramp_time=500ms"]
        return fio(path, workload, self.options.size, "--time_based", f"--runtime={self.options.seconds}", *ramp)

    # -- measuring --

    def wanted(self, *titles):
        return any(self.options.rows.search(title) for title in titles)

    def add_row(self, row):
        self.rows.append(row)
        shown = ", ".join(f"{name} {row.rate(name):.4g}" for name in row.rates)
        say(f"bench: {row.title}: {shown} {row.unit}".rstrip())

    def measure(self, row, files, workload):
        for _ in range(self.options.rounds):
            for name, file in files.items():
                row.add(name, self.timed(file, workload))
        self.add_row(row)

    def first_six(self):
        chosen = [(workload, targets) for workload, targets in zip(FIRST_SIX, FIRST_SIX_TARGETS)
                  if self.wanted(workload.title)]
        if not chosen:
            return
        with contextlib.ExitStack() as stack:
            files = {}
            for name in self.names:
                image = self.image(name)
                self.warm(image)
                files[name] = stack.enter_context(CONTENDERS[name](self, image)).file
            for workload, targets in chosen:
                self.measure(Row(workload.title, workload.unit, *targets), files, workload)

    def new_images(self):
        """Each round into an image made for it: what allocation costs, and the fsync at its end."""
        scale = 8 if self.options.quick else 1
        plans = [(NEW_SEQUENTIAL, f"--io_size={512 * MIB // scale}"), (NEW_RANDOM, f"--io_size={64 * MIB // scale}")]
        for workload, amount in plans:
            if not self.wanted(workload.title):
                continue
            row = Row(workload.title, workload.unit, of_qemu=3.0, is_fastest=True)
            for _ in range(self.options.rounds):
                for name in self.names:
                    if name == LIMIT:
                        continue
                    image = self.directory / "new.vmdk"
                    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=monolithicSparse", image, GIB)
                    with CONTENDERS[name](self, image) as contender:
                        row.add(name, fio(contender.file, workload, GIB, amount, "--end_fsync=1"))
                    image.unlink()
                    run("sync", "-f", self.directory)
            self.add_row(row)

    # -- other formats --

    def format_rows(self, format):
        """The same workloads with the content in another format: beside ours in a VMDK, and QEMU in that format."""
        if OURS not in self.names:
            return
        self.format_six(format)
        self.format_new(format)
        if self.wanted(f"memory, {format.name}"):
            image = self.directory / f"memory.{format.name}"
            self.fill(format, image)
            self.warm(image)
            self.memory(image, self.options.size, f"{self.options.size // MIB} MiB image, {format.name}")
            image.unlink()

    def fill(self, format, image):
        """An image with the content."""
        if not format.is_laid_out_by_us:
            return format.convert(self.raw_image, image)
        run(self.vdimg, "create", "--quiet", "--size", str(self.options.size), *format.ours, image)
        with Ours(self, image) as served:
            run("dd", f"if={self.raw_image}", f"of={served.file}", "bs=1M", "conv=notrunc,fsync")

    def format_six(self, format):
        chosen = [(workload, targets) for workload, targets in zip(FIRST_SIX, FIRST_SIX_TARGETS)
                  if self.wanted(f"{format.name}: {workload.title}")]
        if not chosen:
            return
        made = [self.directory / f"{OURS}.{format.name}"]
        self.fill(format, made[0])
        with contextlib.ExitStack() as stack:
            contenders = [(OURS, Ours, made[0]), (VMDK, Ours, self.image(OURS))]
            if QEMU in self.names:
                made.append(self.directory / f"{QEMU}.{format.name}")
                run("cp", "--reflink=never", "--sparse=never", *made)
                contenders.append((QEMU, Qemu, made[1]))
            run("sync", "-f", self.directory)
            files = {}
            for name, contender, image in contenders:
                self.warm(image)
                files[name] = stack.enter_context(contender(self, image)).file
            for workload, (_, of_qemu) in chosen:
                row = Row(f"{format.name}: {workload.title}", workload.unit, of_qemu=of_qemu, of_vmdk=0.9)
                self.measure(row, files, workload)
        for image in made:
            image.unlink()

    def format_new(self, format):
        """Into new images, as new_images does; QEMU's best options count."""
        scale = 8 if self.options.quick else 1
        plans = [(NEW_SEQUENTIAL, 1.2, f"--io_size={512 * MIB // scale}"),
                 (NEW_RANDOM, 1.5, f"--io_size={64 * MIB // scale}")]
        for workload, of_qemu, amount in plans:
            title = f"{format.name}: {workload.title}"
            if not self.wanted(title):
                continue
            makings = [(OURS, Ours, format, format.ours), (VMDK, Ours, FORMATS[VMDK], FORMATS[VMDK].ours)]
            if QEMU in self.names:
                makings += [(f"{QEMU} {options}".strip(), Qemu, format, options) for options in format.qemu]
            rates = {}
            for _ in range(self.options.rounds):
                for name, contender, kind, options in makings:
                    rates.setdefault(name, []).append(self.into_new(contender, kind, options, workload, amount))
            row = Row(title, workload.unit, of_qemu=of_qemu, of_vmdk=0.9, is_fastest=True, rates={
                OURS: rates[OURS], VMDK: rates[VMDK]})
            by_qemu = [rates[name] for name in rates if name.startswith(QEMU)]
            if by_qemu:
                row.rates[QEMU] = max(by_qemu, key=max)
            self.raw[title] = rates
            self.add_row(row)

    def into_new(self, contender, format, options, workload, amount):
        image = self.directory / f"new.{format.name}"
        if contender is Ours:
            run(self.vdimg, "create", "--quiet", "--size", "1G", *options, image)
        else:
            run("qemu-img", "create", "-q", "-f", format.driver, *option(options), image, GIB)
        try:
            with contender(self, image) as served:
                return fio(served.file, workload, GIB, amount, "--end_fsync=1")
        finally:
            image.unlink()
            run("sync", "-f", self.directory)

    def chain(self, maker, count):
        """`count` empty snapshots over the base; the name of the last."""
        parent = self.base
        for number in range(1, count + 1):
            child = self.directory / f"{maker}-snapshot{number}.vmdk"
            if maker == OURS:
                run(self.vdimg, "create", "--parent", parent, child)
            else:
                run("qemu-img", "create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", child)
            parent = child
        return parent

    def snapshots(self):
        """How much of its speed without snapshots each keeps through 32 of them."""
        title = "through 32 snapshots, of the same without"
        chosen = [workload for workload in RANDOM_READS if self.wanted(f"{workload.title} {title}")]
        names = [name for name in self.names if name != LIMIT]
        if not chosen or not names:
            return
        self.warm(self.base)
        with contextlib.ExitStack() as stack:
            files = {}
            for name in names:
                top = self.chain(name, 32)
                files[name] = (stack.enter_context(CONTENDERS[name](self, self.base, writable=False)).file,
                               stack.enter_context(CONTENDERS[name](self, top, writable=False)).file)
            for workload in chosen:
                row = Row(f"{workload.title}, {title}", "", kept_target=0.9)
                flat, deep = {}, {}
                for _ in range(self.options.rounds):
                    for name, (without, through) in files.items():
                        flat.setdefault(name, []).append(self.timed(without, workload))
                        deep.setdefault(name, []).append(self.timed(through, workload))
                for name in names:
                    row.rates[name] = [statistics.median(deep[name]) / statistics.median(flat[name])]
                self.raw[row.title] = {"without": flat, "through": deep}
                self.add_row(row)

    def loops(self):
        """A loop device with direct I/O over disk.raw, and the same over the raw file and over the limit's."""
        if not self.wanted(LOOP_TITLE) or OURS not in self.names:
            return
        bare = self.directory / "loop.raw"
        run("cp", "--reflink=never", "--sparse=never", self.raw_image, bare)
        with contextlib.ExitStack() as stack:
            image = self.image(OURS)
            self.warm(bare, image)
            targets = {OURS: stack.enter_context(Ours(self, image)).file, "raw file": bare}
            if LIMIT in self.names:
                self.warm(self.image(LIMIT))
                targets[LIMIT] = stack.enter_context(Limit(self, self.image(LIMIT))).file
            devices = {name: stack.enter_context(loop_device(file)) for name, file in targets.items()}
            medians = {name: [] for name in devices}
            for workload in FIRST_SIX:
                rates = {name: [] for name in devices}
                for _ in range(self.options.rounds):
                    for name, device in devices.items():
                        rates[name].append(self.timed(device, workload))
                for name in devices:
                    medians[name].append(statistics.median(rates[name]))
                self.raw[f"loop: {workload.title}"] = rates
                say(f"bench: loop: {workload.title}: " +
                    ", ".join(f"{name} {medians[name][-1]:.4g}" for name in devices) + f" {workload.unit}")

        def mean_over(other):
            ratios = [mine / its for mine, its in zip(medians[OURS], medians[other])]
            return math.exp(statistics.fmean(map(math.log, ratios)))

        self.add_row(Row(f"{LOOP_TITLE}, of the same over the raw file", "", kept_target=0.9,
                         rates={OURS: [mean_over("raw file")]}))
        if LIMIT in medians:
            self.add_row(Row(f"{LOOP_TITLE}, of the same over the limit's file", "", rates={OURS: [mean_over(LIMIT)]}))

    # -- the block cache --

    def block_cache(self):
        """Reads that hit the cache, beside those of the raw image itself; and how much it speeds up a slow disk."""
        if OURS not in self.names:
            return
        chosen = [workload for workload in RANDOM_READS if self.wanted(f"{workload.title} {CACHE_TITLE}")]
        cache = self.directory / "cache.vci"
        if chosen:
            self.warm(self.raw_image)
            # Filled by reading everything once, and closed.
            with Cached(self, self.raw_image, cache) as served:
                run("dd", f"if={served.file}", "of=/dev/null", "bs=1M")
            self.warm(cache)
            with Ours(self, self.raw_image, writable=False) as bare, Cached(self, self.raw_image, cache) as cached:
                for workload in chosen:
                    rates = {"raw image": [], "cache": []}
                    for _ in range(self.options.rounds):
                        for name, served in (("cache", cached), ("raw image", bare)):
                            rates[name].append(self.timed(served.file, workload))
                    self.raw[f"{workload.title} {CACHE_TITLE}"] = rates
                    kept = statistics.median(rates["cache"]) / statistics.median(rates["raw image"])
                    self.add_row(Row(f"{workload.title} {CACHE_TITLE}", "", kept_target=0.85, rates={OURS: [kept]}))
            cache.unlink()
        if self.wanted(SLOW_TITLE):
            # The same places each time, by a program of its own each time.
            same = ["--io_size=1600k", "--randrepeat=1", "--randseed=1"]
            with Slow(self, self.raw_image) as slow:
                rates = []
                for _ in range(2):
                    with Cached(self, slow.file, cache) as served:
                        rates.append(fio(served.file, RANDOM_READS[0], self.options.size, *same))
            self.raw[SLOW_TITLE] = rates
            self.add_row(Row(SLOW_TITLE, "", kept_target=50, rates={OURS: [rates[1] / rates[0]]}))
            cache.unlink()

    # -- a large image: how soon it is there, how much memory reading it takes --

    def large_image(self):
        """2 TiB, 8 snapshots, a few blocks written in each layer."""
        image = self.directory / "large0.vmdk"
        run(self.vdimg, "create", "--format", "vmdk", "--size", "2T", image)
        for layer in range(9):
            writes = [f"write -P {layer + 1} {(number * 9 + layer) * TIB // 300 >> 20 << 20} 64k"
                      for number in range(32)]
            run("qemu-io", "-f", "vmdk", *[word for write in writes for word in ("-c", write)], image)
            if layer < 8:
                child = self.directory / f"large{layer + 1}.vmdk"
                run(self.vdimg, "create", "--parent", image, child)
                image = child
        return image

    def large(self):
        if not self.wanted("mount of a 2 TiB image", "memory") or OURS not in self.names:
            return
        image = self.large_image()
        mountpoint = self.new_path("mnt")
        mountpoint.mkdir()
        times = []
        try:
            for _ in range(5):
                start = time.monotonic()
                run(self.vdmount, image, mountpoint)
                times.append((time.monotonic() - start) * 1000)
                try:
                    if (mountpoint / "disk.raw").stat().st_size != 2 * TIB:
                        raise RuntimeError("the disk of the 2 TiB image has another size")
                finally:
                    run(self.vdumount, mountpoint)
        finally:
            unmount(mountpoint)
            mountpoint.rmdir()
        self.add_fact("mount of a 2 TiB image over 8 snapshots is ready in", statistics.median(times), "ms", 100)
        self.memory(image, 2 * TIB, "2 TiB image over 8 snapshots")

    def memory(self, image, size, what):
        """The daemon's peak after random reads over everything, then after sequential ones."""
        with Ours(self, image, writable=False) as contender:
            status = f"/proc/{contender.process.pid}/status"
            for workload in [FIRST_SIX[1], FIRST_SIX[2]]:
                fio(contender.file, workload, size, "--time_based", f"--runtime={2 * self.options.seconds}",
                    "--norandommap")
                kib = {key: int(value) for key, value in
                       re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB", pathlib.Path(status).read_text(), re.M)}
                self.add_fact(f"daemon's peak resident memory ({kib['VmRSS'] / 1024:.1f} MiB at the end), {what}, "
                              f"after: {workload.title}", kib["VmHWM"] / 1024, "MiB", 32)

    def add_fact(self, title, value, unit, limit):
        self.facts.append((title, value, unit, limit))
        say(f"bench: {title}: {value:.1f} {unit}")

    def run_all(self):
        self.prepare()
        if VMDK in self.options.formats:
            self.first_six()
            self.new_images()
            self.snapshots()
            self.loops()
            self.block_cache()
            if OURS in self.names and self.wanted("memory"):
                self.warm(self.base)
                self.memory(self.base, self.options.size, f"{self.options.size // MIB} MiB image")
            self.large()
        for name in self.options.formats:
            if name != VMDK:
                self.format_rows(FORMATS[name])


# ---- the report ---------------------------------------------------------------------------------------------------


def number(value, form=".4g"):
    return "" if value is None else format(value, form)


def verdict(measured, target):
    if measured is None or target is None:
        return number(measured, ".2f")
    return f"{measured:.2f} " + ("ok" if round(measured, 2) >= target else "**short**")


def table_of(heads, right_from, rows):
    """A Markdown table; the columns from `right_from` on are numbers."""
    rule = ["---" if column < right_from else "--:" for column in range(len(heads))]
    return ["| " + " | ".join(cells) + " |" for cells in [heads, rule, *rows]] + [""] if rows else []


def tables(bench):
    rates = [[row.title, row.unit, *[number(row.rate(name)) for name in (OURS, LIMIT, QEMU)],
              number(row.of_limit, "g"), verdict(row.ratio(LIMIT), row.of_limit),
              number(row.of_qemu, "g"), verdict(row.ratio(QEMU), row.of_qemu)]
             for row in bench.rows if row.unit and not row.of_vmdk]
    formats = [[row.title, row.unit, *[number(row.rate(name)) for name in (OURS, VMDK, QEMU)],
                number(row.of_vmdk, "g"), verdict(row.ratio(VMDK), row.of_vmdk),
                number(row.of_qemu, "g"), verdict(row.ratio(QEMU), row.of_qemu)]
               for row in bench.rows if row.of_vmdk]
    kept = [[row.title, number(row.kept_target, "g"), verdict(row.rate(OURS), row.kept_target),
             number(row.rate(QEMU), ".2f")]
            for row in bench.rows if not row.unit]
    facts = [[title, f"{limit} {unit}", f"{value:.1f} {unit} " + ("ok" if value < limit else "**short**")]
             for title, value, unit, limit in bench.facts]
    return "\n".join(
        table_of(["workload", "unit", "ours", "limit", "QEMU", "of limit: target", "measured", "of QEMU: target",
                  "measured"], 2, rates)
        + table_of(["format: workload", "unit", "ours", "ours in VMDK", "QEMU", "of VMDK: target", "measured",
                    "of QEMU: target", "measured"], 2, formats)
        + table_of(["what is kept", "target", "ours", "QEMU's own"], 1, kept)
        + ([LOOP_NOTE, ""] if any(LOOP_TITLE in row.title for row in bench.rows) else [])
        + table_of(["time and memory", "limit", "measured"], 1, facts)).rstrip()


def first_line(*command):
    with contextlib.suppress(OSError, RuntimeError, IndexError):
        return run(*command).strip().splitlines()[0]
    return "unknown"


def machine_facts(directory):
    """What the machine is, and with what the figures were had."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    kernel = re.match(r"[\d.]*", os.uname().release)[0]
    file_system = first_line("stat", "-f", "-c", "%T", directory)
    return "\n".join([
        f"- {cpu[1] if cpu else os.uname().machine}, {os.cpu_count()} cores; Linux {kernel}",
        f"- libfuse {first_line('pkg-config', '--modversion', 'fuse3')}, {first_line('qemu-storage-daemon', '-V')}, "
        f"{first_line('fio', '--version')}, C: {first_line('cc', '--version')}",
        f"- {datetime.date.today().isoformat()}; on {file_system}",
    ])


def machine(options, directory):
    return "\n".join([
        machine_facts(directory),
        f"- images of {options.size // MIB} MiB, in the page cache; {options.rounds} rounds of {options.seconds} s in "
        "turn, medians (into new images: the fastest)"
        + (" (quick: too short to rely on)" if options.quick else ""),
    ])


def write_output(path, text, part="bench"):
    """Replaces what stands between a part's marks, and keeps what was written around it by hand."""
    begin, end = f"<!-- measured by make {part}: begin -->", f"<!-- measured by make {part}: end -->"
    path = pathlib.Path(path)
    block = f"{begin}\n\n{text}\n\n{end}"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin in old and end in old:
        new = old[:old.index(begin)] + block + old[old.index(end) + len(end):]
    else:
        new = (old or "# Benchmarks\n\nMeasured by `make bench`; what each row means: Tests/Bench/bench.py.\n") + \
            f"\n{block}\n"
    path.write_text(new, encoding="utf-8")


def parse_size(text):
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"not a size: {text}")
    size = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]
    if size < 64 * MIB or size % (4 * MIB):
        raise argparse.ArgumentTypeError(f"not a multiple of 4M, from 64M on: {text}")
    return size


def parse_arguments():
    parser = argparse.ArgumentParser(description="Measures vdmount beside its limit and qemu-storage-daemon.")
    parser.add_argument("--bin", default=".build/release", help="where vdmount, vdumount and vdimg are")
    parser.add_argument("--dir", default="/var/tmp", help="where the images go (about 7 times --size)")
    parser.add_argument("--size", type=parse_size, default=None, help="bytes of the disk (1G; with --quick 256M)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=None, help="a round of a timed workload (4; with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="short rounds, a small disk: to see that it works")
    parser.add_argument("--rows", type=lambda text: re.compile(text, re.I), default=re.compile(""), metavar="REGEX",
                        help="only the rows whose title matches")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="LIST",
                        help="which formats; those that this build does not know are left out")
    parser.add_argument("--contenders", default="ours,limit,qemu", help="which of ours,limit,qemu")
    parser.add_argument("--output", metavar="FILE", help="also write the table into this file")
    parser.add_argument("--json", metavar="FILE", help="also write every round's number into this file")
    options = parser.parse_args()
    options.size = options.size or (256 * MIB if options.quick else GIB)
    options.seconds = options.seconds or (1 if options.quick else 4)
    options.contenders = options.contenders.split(",")
    if unknown := set(options.contenders) - set(CONTENDERS):
        parser.error(f"no such contender: {', '.join(unknown)}")
    options.formats = options.formats.split(",")
    if unknown := set(options.formats) - set(FORMATS):
        parser.error(f"no such format: {', '.join(unknown)}; there are {', '.join(FORMATS)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def check_environment(options):
    tools = ["qemu-img", "qemu-io", "qemu-storage-daemon", "fio", "losetup", "cc", "pkg-config"]
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        sys.exit(f"bench: missing: {', '.join(missing)}: run 'make deps'")
    if os.geteuid() != 0:
        sys.exit("bench: needs root, for mounts and loop devices")
    if not os.path.exists("/dev/fuse"):
        sys.exit("bench: /dev/fuse is missing")
    if OURS in options.contenders:
        for name in ("vdmount", "vdumount", "vdimg"):
            if not os.access(os.path.join(options.bin, name), os.X_OK):
                sys.exit(f"bench: {options.bin}/{name} is missing: run 'make build'")
        known = {format["name"] for format in json.loads(run(os.path.join(options.bin, "vdimg"), "formats", "--json"))}
        for name in sorted(set(options.formats) - known):
            say(f"bench: this build does not know {name}")
        options.formats = [name for name in options.formats if name in known]


def main():
    options = parse_arguments()
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    check_environment(options)
    # Ends as an interruption does: every mount, daemon and file of this run is taken away on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    with tempfile.TemporaryDirectory(prefix="vdmount-bench.", dir=options.dir) as name:
        bench = Bench(options, pathlib.Path(name).resolve())
        bench.run_all()
        where = machine(options, name)
    text = where + "\n\n" + tables(bench)
    print(text)
    short = text.count("**short**")
    print(f"\n{short} below target" if short else "\nall targets met" if OURS in bench.names else "")
    if options.output:
        write_output(options.output, text)
    if options.json:
        rounds = {row.title: row.rates for row in bench.rows}
        pathlib.Path(options.json).write_text(json.dumps({"rows": rounds, "more": bench.raw}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(f"bench: {error}")
