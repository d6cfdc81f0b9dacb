"""Models in several files: written as llama.cpp's gguf-split names and numbers them, read back from the folder or the first file."""

import gguf
import pytest
import torch
from click.testing import CliRunner

from lowbit.cli.convert import convert_command
from lowbit.errors import CheckpointError, OptionError
from lowbit.metadata import SideFile
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedTensor
from lowbit.testing import ExporterContract
from lowbit_formats.gguf import GgufExporter, GgufImporter
from lowbit_formats.gguf.block_types import TYPES
from lowbit_formats.gguf.parts import divided, part_keys, part_name
from lowbit_formats.gguf.writer import Slot


class FolderExporter(GgufExporter):
    """The same exporter, its destination a folder: what the contract is to write to."""

    suffix = ""


@pytest.fixture
def source(gguf_models, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model.gguf"
    gguf_models.write(path, gguf_models.Recipe(types={"blk.0.attn_q.weight": "Q4_0"}, tied=False))
    with GgufImporter().open(path) as checkpoint:
        return dict(checkpoint.stream()), checkpoint.metadata


class TestGgufFolder(ExporterContract):
    @pytest.fixture
    def exporter(self):
        return FolderExporter()

    @pytest.fixture
    def importer(self):
        return GgufImporter()

    @pytest.fixture
    def values(self, source):
        return source[0]

    @pytest.fixture
    def metadata(self, source):
        files = (
            *source[1].side_files,
            SideFile("LICENSE", content=b"do as you like"),
            SideFile("notes.md", content=b"x"),
        )
        return type(source[1])(source[1].config, files, source[1].provenance)


def written(source, path, shard_size):
    values, metadata = source
    entries = {name: v.spec if isinstance(v, PackedTensor) else TensorSpec.of(v) for name, v in values.items()}
    GgufExporter().write(path, entries, iter(values.items()), metadata, shard_size)
    return sorted(path.glob("*.gguf"))


def test_each_part_says_which_it_is_and_the_first_has_the_keys(source, tmp_path):
    files = written(source, tmp_path / "tiny", 200_000)
    count = len(files)
    assert 2 < count < len(source[0])
    assert [file.name for file in files] == [f"tiny-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    readers = [gguf.GGUFReader(file) for file in files]
    for index, reader in enumerate(readers):
        fields = {name: field for name, field in reader.fields.items() if name.startswith("split.")}
        assert {name: field.contents() for name, field in fields.items()} == {
            "split.no": index,
            "split.count": count,
            "split.tensors.count": len(source[0]),
        }
        kinds = {name: field.types[0].name for name, field in fields.items()}
        assert kinds == {"split.no": "UINT16", "split.count": "UINT16", "split.tensors.count": "INT32"}
        assert ("general.architecture" in reader.fields) == (index == 0)
        assert len(reader.tensors) == 1 or sum(tensor.n_bytes for tensor in reader.tensors) <= 200_000
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    assert len(names) == len(set(names)) == len(source[0])


def test_one_part_is_no_split(source, tmp_path):
    (file,) = written(source, tmp_path / "tiny", 10**9)
    assert file.name == "tiny.gguf"
    assert "split.count" not in gguf.GGUFReader(file).fields


def test_the_first_file_opens_the_whole_model(source, tmp_path):
    files = written(source, tmp_path / "tiny", 200_000)
    with GgufImporter().open(files[0]) as checkpoint:
        assert list(checkpoint.entries) == list(source[0])
    with pytest.raises(CheckpointError, match=r"a part of a model in \d+ files; open the one named"):
        GgufImporter().open(files[1])
    files[-1].unlink()
    with pytest.raises(CheckpointError, match="is not beside it"):
        GgufImporter().open(tmp_path / "tiny")


def test_norms_of_gemma_come_back_from_parts(gguf_models, tmp_path):
    recipe = gguf_models.Recipe(architecture="gemma3", keys={"gemma3.attention.sliding_window": 32})
    gguf_models.write(tmp_path / "model.gguf", recipe)
    with GgufImporter().open(tmp_path / "model.gguf") as checkpoint:
        values, metadata = dict(checkpoint.stream()), checkpoint.metadata
    values["model.norm.weight"] = torch.tensor([2.0**-26, -0.0, 0.0, -1e-30] * 64)
    written((values, metadata), tmp_path / "parts", 100_000)
    with GgufImporter().open(tmp_path / "parts") as again:
        assert torch.equal(
            again.read("model.norm.weight").view(torch.int32), values["model.norm.weight"].view(torch.int32)
        )


def test_folders_that_are_refused(source, tmp_path):
    importer, folder = GgufImporter(), tmp_path / "some"
    folder.mkdir()
    assert "no .gguf file" in importer.why_not(folder)
    files = written(source, tmp_path / "tiny", 200_000)
    (folder / files[1].name).write_bytes(files[1].read_bytes())
    assert "not the first part" in importer.why_not(folder)
    for name in ("one.gguf", "two.gguf"):
        (folder / name).write_bytes(b"GGUF")
    assert "2 .gguf models (one.gguf, two.gguf)" in importer.why_not(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert ".safetensors" in importer.why_not(folder), "a model of Hugging Face with a GGUF beside it"


def test_files_of_the_folder_stand_in_for_rebuilt_ones(source, tmp_path):
    written(source, tmp_path / "tiny", 10**9)
    (tmp_path / "tiny" / "tokenizer_config.json").write_text('{"mine": true}')
    with GgufImporter().open(tmp_path / "tiny") as checkpoint:
        names = [file.name for file in checkpoint.metadata.side_files]
        assert checkpoint.metadata.side_file("tokenizer_config.json").read() == b'{"mine": true}'
    assert len(names) == len(set(names))


def test_parts_keep_the_order_and_the_limit():
    slots = [Slot(str(index), TYPES["F32"], (size,)) for index, size in enumerate((10, 10, 50, 8, 8, 8))]
    parts = divided(slots, 128)  # 10 floats take 64 bytes, padded
    assert [[slot.name for slot in part] for part in parts] == [["0", "1"], ["2"], ["3", "4", "5"]]
    with pytest.raises(CheckpointError, match="70,000, and GGUF counts to 65,535"):
        divided([slots[0]] * 70_000, 1)


def test_names_and_keys_of_parts():
    assert part_name("m", 0, 1) == "m.gguf"
    assert part_name("m", 1, 12) == "m-00002-of-00012.gguf"
    assert part_keys(0, 1, 5) == []


def run(*arguments):
    """The convert command in this process; what a LowbitError would make exit code 2 is raised."""
    return CliRunner().invoke(convert_command, [*map(str, arguments)], catch_exceptions=True)


@pytest.fixture
def model_file(gguf_models, tmp_path):
    gguf_models.write(tmp_path / "model.gguf", gguf_models.Recipe(keys={"general.license": "mit"}))
    return tmp_path / "model.gguf"


def test_a_shard_size_and_a_single_file_contradict_each_other(model_file, tmp_path):
    result = run(model_file, tmp_path / "out.gguf", "-f", "gguf", "--shard-size", "200KB")
    assert isinstance(result.exception, OptionError)
    assert "out.gguf is one file and would hold" in str(result.exception)
    assert f"give a folder, such as {tmp_path / 'out'}," in str(result.exception)
    assert not (tmp_path / "out.gguf").exists()
    assert run(model_file, tmp_path / "out.gguf", "-f", "gguf", "--shard-size", "1GB").exit_code == 0


def test_side_files_without_a_place_are_told(model_file, tmp_path):
    """The folder has a licence; a single file made of it has only the name of one."""
    result = run(model_file, tmp_path / "folder", "-f", "gguf", "--shard-size", "200KB")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(list((tmp_path / "folder").glob("*.gguf"))) > 2
    assert (tmp_path / "folder" / "README.md").read_text().startswith('---\nlicense: "mit"\n')
    (tmp_path / "folder" / "LICENSE").write_text("do as you like")
    result = run(tmp_path / "folder", tmp_path / "again.gguf", "-f", "gguf")
    assert result.exit_code == 0
    assert (
        result.stderr == f"Warning: {tmp_path / 'again.gguf'} has no place for LICENSE; a folder as destination has.\n"
    )
    assert gguf.GGUFReader(tmp_path / "again.gguf").fields["general.license"].contents() == "mit"
