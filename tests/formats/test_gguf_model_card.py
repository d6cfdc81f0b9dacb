"""The model card in GGUF: its front matter becomes keys, keys become a card again, and other side files are named as left out."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from lowbit.errors import CheckpointError
from lowbit.metadata import Metadata, SideFile
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedTensor
from lowbit_formats.gguf import GgufExporter, GgufImporter
from lowbit_formats.gguf.model_card import front_matter, to_keys

CARD = """---
license: other
license_name: 'tiny''s licence'   # written by hand
license_link: https://example.org/licence
language:
  - en
  - "no"
tags: [tiny, "test model"]
base_model:
- someone/Tiny-Base-1B
- Nameless
datasets:
- https://example.org/data/set
model-index:
  - name: nested
    results: []
---

# Tiny

license: mit
"""


def test_the_front_matter_of_a_card():
    assert front_matter(CARD) == {
        "license": ["other"],
        "license_name": ["tiny's licence"],
        "license_link": ["https://example.org/licence"],
        "language": ["en", "no"],
        "tags": ["tiny", "test model"],
        "base_model": ["someone/Tiny-Base-1B", "Nameless"],
        "datasets": ["https://example.org/data/set"],
    }


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# Title\nlicense: mit\n",
        "---\nlicense: mit\n",
        "---\nlicense: |\n  many\n  lines\n---\n",
        "---\n- a\n---\n",
    ],
    ids=["empty", "none", "open", "block", "list"],
)
def test_what_is_no_front_matter_gives_nothing(card):
    assert front_matter(card) == {}


@pytest.fixture
def source(gguf_models, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "model.gguf"
    gguf_models.write(path, gguf_models.Recipe())
    with GgufImporter().open(path) as checkpoint:
        return dict(checkpoint.stream()), checkpoint.metadata


def with_files(metadata, **files):
    made = {name.replace("_json", ".json").replace("_md", ".md"): content.encode() for name, content in files.items()}
    kept = tuple(file for file in metadata.side_files if file.name not in made)
    return replace(metadata, side_files=(*kept, *(SideFile(name, content=content) for name, content in made.items())))


def written(source, path, **files):
    values, metadata = source
    entries = {name: v.spec if isinstance(v, PackedTensor) else TensorSpec.of(v) for name, v in values.items()}
    GgufExporter().write(path, entries, iter(values.items()), with_files(metadata, **files))
    return path


def test_the_gguf_package_reads_the_keys(source, tmp_path):
    reader = gguf.GGUFReader(written(source, tmp_path / "m.gguf", README_md=CARD))
    found = {name: field.contents() for name, field in reader.fields.items() if name.startswith("general.")}
    assert found["general.license"] == "other"
    assert found["general.license.name"] == "tiny's licence"
    assert found["general.languages"] == ["en", "no"]
    assert found["general.tags"] == ["tiny", "test model"]
    assert found["general.base_model.count"] == 2
    assert found["general.base_model.0.organization"] == "someone"
    assert found["general.base_model.0.name"] == "Tiny-Base-1B"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/someone/Tiny-Base-1B"
    assert found["general.base_model.1.name"] == "Nameless"
    assert found["general.dataset.0.repo_url"] == "https://example.org/data/set"


def test_reading_makes_a_card_with_the_same_fields(source, tmp_path):
    path = written(source, tmp_path / "first.gguf", README_md=CARD)
    with GgufImporter().open(path) as checkpoint:
        card = checkpoint.metadata.side_file("README.md").read().decode()
        again = to_keys(checkpoint.metadata)
    assert front_matter(card) == front_matter(CARD)
    assert again == to_keys(with_files(source[1], README_md=CARD))


def test_a_file_that_says_nothing_of_itself_gets_no_card(source):
    assert source[1].side_file("README.md") is None


def test_a_model_is_called_as_its_source_unless_it_has_a_name():
    keys = {key.name: key.value for key in to_keys(Metadata({}, (), {"source": "Tiny-1B"}))}
    assert keys == {"general.name": "Tiny-1B"}
    assert to_keys(Metadata({}, (), {"source": "Tiny-1B", "general.name": "Tiny"})) == []


def test_how_to_sample_survives(source, tmp_path):
    wanted = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1}
    path = written(source, tmp_path / "m.gguf", generation_config_json=json.dumps(wanted))
    fields = gguf.GGUFReader(path).fields
    assert fields["general.sampling.top_k"].contents() == 20
    assert fields["general.sampling.temp"].contents() == pytest.approx(0.6)
    with GgufImporter().open(path) as checkpoint:
        found = json.loads(checkpoint.metadata.side_file("generation_config.json").read())
    assert wanted.items() <= found.items()


def test_greedy_models_say_nothing_of_sampling(source, tmp_path):
    path = written(source, tmp_path / "m.gguf", generation_config_json='{"do_sample": false, "temperature": 0.6}')
    assert not any(name.startswith("general.sampling") for name in gguf.GGUFReader(path).fields)


def test_a_temperature_that_is_no_number_is_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match="temperature is 'hot'; it must be a number"):
        written(source, tmp_path / "m.gguf", generation_config_json='{"do_sample": true, "temperature": "hot"}')
    assert list(tmp_path.iterdir()) == []


def test_what_a_single_file_has_no_place_for_is_named(source):
    metadata = with_files(source[1], README_md=CARD, LICENSE="mine", notes_md="x")
    assert list(GgufExporter().left_out(Path("out.gguf"), metadata)) == ["LICENSE", "notes.md"]
    assert list(GgufExporter().left_out(Path("out"), metadata)) == []
