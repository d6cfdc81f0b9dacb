import errno
import os

import pytest

from lowbit.errors import OutputError
from lowbit.staging import check_destination, remove, staged, write_error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(path, kind, text):
    """Write a file, or a folder with a file and a subfolder in it."""
    if kind == "file":
        path.write_text(text)
    else:
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "part").write_text(text)


def content(path):
    return (path if path.is_file() else path / "sub" / "part").read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_destination_appears_when_the_block_ends(tmp_path, kind):
    destination = tmp_path / "out"
    with staged(destination) as temporary:
        fill(temporary, kind, "new")
        assert temporary.parent == tmp_path, "a rename must not cross disks"
        assert not destination.exists()
    assert content(destination) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_nothing_is_left_when_the_block_raises(tmp_path, kind, error):
    def work():
        with staged(tmp_path / "out") as temporary:
            if kind != "nothing":
                fill(temporary, kind, "half")
            raise error

    with pytest.raises(error):
        work()
    assert names(tmp_path) == []


@pytest.mark.parametrize("old", ["file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_overwrite_replaces_a_file_or_a_folder(tmp_path, old, new):
    destination = tmp_path / "out"
    fill(destination, old, "old")
    with staged(destination, overwrite=True) as temporary:
        fill(temporary, new, "new")
        assert content(destination) == "old"
    assert content(destination) == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_overwrite_keeps_the_old_result(tmp_path, kind):
    destination = tmp_path / "out"
    fill(destination, kind, "old")

    def work():
        with staged(destination, overwrite=True) as temporary:
            fill(temporary, kind, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert content(destination) == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_rename_brings_the_old_result_back(tmp_path, kind, error, monkeypatch):
    destination = tmp_path / "out"
    fill(destination, kind, "old")
    rename = type(destination).replace

    def refuse(path, target):
        if path.name.endswith(".partial") and not target.name.endswith(".replaced"):
            raise error
        return rename(path, target)

    monkeypatch.setattr(type(destination), "replace", refuse)

    def work():
        with staged(destination, overwrite=True) as temporary:
            fill(temporary, kind, "new")

    with pytest.raises((OutputError, KeyboardInterrupt)) as raised:
        work()
    assert str(raised.value) in ("", f"cannot write {destination}: Input/output error")
    assert content(destination) == "old"
    assert names(tmp_path) == ["out"]


def test_an_existing_destination_is_refused_before_the_block_runs(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match=r"out exists; give --overwrite to replace it"), staged(tmp_path / "out"):
        pytest.fail("the block ran")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"the folder .*none does not exist; create it first"):
        check_destination(tmp_path / "none" / "out", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="is not writable; choose another destination"):
        check_destination(tmp_path / "out", overwrite=False)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_in_a_sentence(tmp_path, number):
    def work():
        with staged(tmp_path / "out") as temporary:
            temporary.write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(OutputError, match=r"the disk is full; .*out was not written, free some space"):
        work()
    assert names(tmp_path) == []


def test_a_disk_that_is_really_full(tmp_path):
    """/dev/full fails every write, as a full disk does."""

    def work():
        with staged(tmp_path / "out") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x" * 10_000)

    with pytest.raises(OutputError, match="the disk is full"):
        work()
    assert names(tmp_path) == []


def test_other_errors_keep_the_system_s_words(tmp_path):
    error = write_error(tmp_path / "out", OSError(errno.EIO, "Input/output error"))
    assert str(error) == f"cannot write {tmp_path / 'out'}: Input/output error"
    assert str(write_error(tmp_path / "out", OSError("odd"))).endswith("out: odd")


def test_links_are_replaced_never_followed(tmp_path):
    precious = tmp_path / "precious"
    fill(precious, "folder", "mine")
    destination = tmp_path / "out"
    destination.symlink_to(precious, target_is_directory=True)
    with staged(destination, overwrite=True) as temporary:
        fill(temporary, "folder", "new")
    assert not destination.is_symlink()
    assert (content(precious), content(destination)) == ("mine", "new")
    link = tmp_path / "link"
    link.symlink_to(precious, target_is_directory=True)
    remove(link)
    assert content(precious) == "mine"
    assert names(tmp_path) == ["out", "precious"]


def test_a_link_inside_a_discarded_folder_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    fill(precious, "folder", "mine")

    def work():
        with staged(tmp_path / "out") as temporary:
            temporary.mkdir()
            (temporary / "link").symlink_to(precious, target_is_directory=True)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert content(precious) == "mine"


def test_a_dangling_link_counts_as_existing(tmp_path):
    destination = tmp_path / "out"
    destination.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists; give --overwrite"):
        check_destination(destination, overwrite=False)
    with staged(destination, overwrite=True) as temporary:
        fill(temporary, "file", "new")
    assert content(destination) == "new"
    assert names(tmp_path) == ["out"]


def test_removing_what_is_not_there_is_fine(tmp_path):
    remove(tmp_path / "nothing")
    assert names(tmp_path) == []
