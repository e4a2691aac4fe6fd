#!/usr/bin/env python3
"""Makes the first inputs of the fuzzer: images by qemu-img, in the form that the target takes apart."""
import os
import struct
import subprocess
import sys
import tempfile


def seed(folder, name, how, image, other=b""):
    with open(os.path.join(folder, name), "wb") as file:
        file.write(bytes([how]) + struct.pack("<I", len(image)) + image + other)


def main(folder):
    os.makedirs(folder, exist_ok=True)
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


if __name__ == "__main__":
    main(sys.argv[1])
