"""Install labkit from this folder, with no network: `sh install.sh`, `install.ps1`, or `python install.py`.

Standard library only. Checks every file against SHA256SUMS, makes `.venv` here and installs the wheels into it.
"""

import hashlib
import json
import pathlib
import platform
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).resolve().parent


def main():
    about = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    wrong = unfit(about) or damaged()
    if wrong:
        sys.exit("install: " + wrong)
    folder = HERE / ".venv"
    print("Making", folder)
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    command = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--find-links", str(HERE / "wheels"), about["requirement"]])
    if done.returncode:
        sys.exit("install: pip could not install {}; its words are above.".format(about["requirement"]))
    print("Done. Stay in {} and run:  {} lab".format(HERE, programs / "labkit"))


def unfit(about):
    """Why the wheels do not fit this Python, or an empty text."""
    here = {"python": "{}.{}".format(*sys.version_info), "system": platform.system(), "machine": platform.machine()}
    wanted = {key: about[key] for key in here}
    if here == wanted:
        return ""
    words = "Python {python} on {system} {machine}"
    said = "this bundle is for {}; this is {}. Start it with a Python that fits, or ask for a bundle made on such a machine."
    return said.format(words.format(**wanted), words.format(**here))


def damaged():
    """The first file that is absent or not as it was, or an empty text."""
    for line in (HERE / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        noted, name = line.split("  ", 1)
        if not (HERE / name).is_file():
            return f"{name} is missing; unpack the whole bundle again."
        digest = hashlib.sha256()
        with open(HERE / name, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
        if digest.hexdigest() != noted:
            return f"{name} is damaged: its SHA-256 differs from the one noted; copy the bundle again."
    return ""


if __name__ == "__main__":
    main()
