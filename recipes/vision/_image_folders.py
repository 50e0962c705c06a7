"""Folders of images, one per class, and checks of their layout."""

from pathlib import Path

from torchvision.datasets import ImageFolder

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")


def open_folders(root: Path, train: str, test: str) -> tuple[ImageFolder, ImageFolder]:
    """The images in ``root/<train>/<class>/`` and ``root/<test>/<class>/``, not read yet.

    Raises:
        FileNotFoundError: If one of the two is missing, or a class has no images.
        ValueError: If an archive was not unpacked, images are not sorted by class, or the classes of the two differ.
    """
    for part in (train, test):
        _check_part(root, part, train, test)
    folders = ImageFolder(str(root / train), allow_empty=True), ImageFolder(str(root / test), allow_empty=True)
    differing = sorted(set(folders[0].classes) ^ set(folders[1].classes))
    if differing:
        only = train if differing[0] in folders[0].class_to_idx else test
        raise ValueError(
            f"the class folders of {train}/ and {test}/ in {root} differ: {differing[0]!r} is in {only}/ only"
            f" ({len(differing)} such folders).\nA label is a place in the sorted list of folders, so images would get"
            " wrong labels. Add or remove folders."
        )
    for folder in folders:
        empty = sorted(set(range(len(folder.classes))).difference(folder.targets))
        if empty:
            raise FileNotFoundError(
                f"no images in {Path(folder.root, folder.classes[empty[0]])}, nor in {len(empty) - 1} more of"
                f" {len(folder.classes)} class folders. Image files end in {', '.join(folder.extensions or ())}."
            )
    return folders


def check_unpacked(root: Path) -> None:
    """Raises if ``root`` is an archive, or a folder with one in it.

    Raises:
        ValueError: If it is, with the command that unpacks it, or if it is another file.
    """
    if root.is_file():
        if not root.name.endswith(_ARCHIVES):
            raise ValueError(f"`data.root` must be a folder, got the file {root}.")
        ending = max((ending for ending in _ARCHIVES if root.name.endswith(ending)), key=len)
        folder = root.with_name(root.name.removesuffix(ending))
        raise ValueError(
            f"`data.root` {root} is an archive. Unpack it and use `--data.root {folder}`:\n{_unpack(root, folder)}"
        )
    archives = sorted(entry for entry in root.glob("*") if entry.name.endswith(_ARCHIVES))
    if len(archives) > 1 and root.name in ("train", "val"):  # ImageNet's training archive holds one per class
        raise ValueError(
            f"{len(archives)} archives in {root} were not unpacked, {archives[0].name} first. Each needs a folder:\n"
            f'cd {root} && for f in *.tar; do mkdir "${{f%.tar}}" && tar -xf "$f" -C "${{f%.tar}}"; done'
        )
    if archives:
        part = next((part for part in ("train", "val") if f"_{part}." in archives[0].name), "")
        raise ValueError(f"{archives[0]} was not unpacked. Unpack it:\n{_unpack(archives[0], root / part)}")


def _check_part(root: Path, part: str, train: str, test: str) -> None:
    folder = root / part
    if not folder.is_dir():
        check_unpacked(root)
        inner = next((entry for entry in sorted(root.glob("*/")) if (entry / train).is_dir()), None)
        raise FileNotFoundError(
            f"`data.root` {root} has no folder {part}/."
            + (f" Did you mean {inner}?" if inner else f" It needs {train}/<class>/ and {test}/<class>/ of images.")
        )
    if any(entry.is_dir() for entry in folder.iterdir()):
        return
    check_unpacked(folder)
    files = sum(1 for _ in folder.glob("[!.]*"))
    if not files:
        raise FileNotFoundError(f"no images in {folder}. It needs a folder of images per class.")
    cure = "Sort it into a folder of images per class."
    if part == "val":
        cure = (
            "Sort it as `valprep` scripts do: one loop over the\ndevkit's class list that makes the folder of each"
            f" image's class, named as in {train}/, and moves the image into it."
        )
    raise ValueError(f"{folder} is flat: {files} files and no class folders. {cure}")


def _unpack(archive: Path, folder: Path) -> str:
    if archive.suffix == ".zip":
        return f"unzip -q {archive} -d {folder}"
    return f"mkdir -p {folder} && tar -xf {archive} -C {folder}"
