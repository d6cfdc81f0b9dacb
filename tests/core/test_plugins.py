import importlib.metadata
import types

import pytest

import lowbit
from lowbit import Registry, hookimpl
from lowbit.errors import DuplicateComponentError, PluginError
from lowbit.plugins import installed, registry

GOOD = """
from lowbit import Grid, Packer, hookimpl

class Toy(Packer):
    layout = "toy"
    def why_not(self, scheme, shape): return "never"
    def specs(self, scheme, shape): return {}
    def pack(self, quantized): raise NotImplementedError
    def unpack(self, packed): raise NotImplementedError

@hookimpl
def lowbit_register_packers(register):
    register(Toy())
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A way to put distributions with an entry point on the path, as pip would, and nothing else in the group."""
    monkeypatch.syspath_prepend(tmp_path)
    real = importlib.metadata.entry_points
    ours = set()

    def only_ours(**selection):
        return [entry for entry in real(**selection) if entry.name in ours]

    monkeypatch.setattr("lowbit.plugins.entry_points", only_ours)
    monkeypatch.delenv("LOWBIT_DISABLE_PLUGINS", raising=False)
    monkeypatch.delenv("LOWBIT_TRACE_PLUGINS", raising=False)

    def add(name, source, module=None):
        module = module or f"module_of_{name}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"lowbit_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lowbit-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lowbit]\n{name} = {module}\n")
        ours.add(name)

    installed.cache_clear()
    yield add
    installed.cache_clear()


def test_entry_points_are_found_without_an_import_by_name(site):
    site("toy", GOOD)
    found = installed()
    assert list(found.packers) == ["toy"]
    assert installed() is found


def test_a_broken_plugin_is_named_with_the_way_out(site, monkeypatch):
    site("good", GOOD)
    site("broken", "import no_such_module_anywhere")
    with pytest.raises(PluginError) as raised:
        installed()
    assert str(raised.value) == (
        "plugin 'broken' (module_of_broken) failed to load: No module named 'no_such_module_anywhere'; "
        "reinstall it, or set LOWBIT_DISABLE_PLUGINS=broken to go on without it"
    )
    monkeypatch.setenv("LOWBIT_DISABLE_PLUGINS", " other, broken ")
    assert list(installed().packers) == ["toy"]


def test_a_disabled_plugin_is_not_even_imported(site, monkeypatch, tmp_path):
    site("eager", f"open({str(tmp_path / 'imported')!r}, 'w').close()")
    monkeypatch.setenv("LOWBIT_DISABLE_PLUGINS", "eager")
    assert len(installed().packers) == 0
    assert not (tmp_path / "imported").exists()


def test_two_plugins_with_one_name_are_refused_naming_both(site):
    site("first", GOOD)
    site("second", GOOD)
    with pytest.raises(DuplicateComponentError, match="two layouts are named 'toy'") as raised:
        installed()
    assert "module_of_first" in str(raised.value)
    assert "module_of_second" in str(raised.value)


def test_tracing_prints_every_hook_call(site, monkeypatch, capsys):
    site("toy", GOOD)
    monkeypatch.setenv("LOWBIT_TRACE_PLUGINS", "1")
    installed()
    lines = capsys.readouterr().err.splitlines()
    assert "lowbit: lowbit_register_packers -> toy" in lines
    assert "lowbit: lowbit_register_kernels -> nobody" in lines
    assert "lowbit: lowbit_register_packers done" in lines


def test_tracing_tells_of_failures(monkeypatch, capsys):
    monkeypatch.setenv("LOWBIT_TRACE_PLUGINS", "1")
    with pytest.raises(PluginError):
        registry(plugin(lowbit_register_packers=lambda register: register(Registry())))
    assert "lowbit: lowbit_register_packers failed: " in capsys.readouterr().err


def plugin(**hooks):
    """Return a module with hook implementations."""
    module = types.ModuleType("a_plugin")
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


def test_a_misspelt_hook_is_an_error():
    with pytest.raises(PluginError, match=r"a hook that lowbit does not have: .*lowbit_register_quantizer"):
        registry(plugin(lowbit_register_quantizer=lambda register: None))


def test_a_hook_that_returns_something_is_an_error():
    with pytest.raises(PluginError, match="lowbit_register_packers returned 'Toy'; call register"):
        registry(plugin(lowbit_register_packers=lambda register: "Toy"))


def test_a_class_instead_of_an_instance_is_an_error():
    with pytest.raises(PluginError, match="Kernel is no Kernel instance; register an instance, not a class"):
        registry(plugin(lowbit_register_kernels=lambda register: register(lowbit.Kernel)))


def test_a_hook_with_an_argument_that_does_not_exist_is_an_error():
    with pytest.raises(PluginError, match=r"lowbit does not give: Plugin 'a_plugin'.*'registry'") as raised:
        registry(plugin(lowbit_register_kernels=lambda register, registry: None))
    assert "\n" not in str(raised.value)


def test_a_registry_of_chosen_plugins_holds_nothing_else():
    module = types.ModuleType("good")
    exec(GOOD, module.__dict__)  # noqa: S102  # our own source, as the entry point above imports it
    found = registry(module)
    assert list(found.packers) == ["toy"]
    assert [len(table) for table in (found.kernels, found.importers, found.exporters, found.quantizers)] == [0] * 4


def test_every_hook_registers_into_its_own_table():
    """Each hook of the API has a table, and reaches it."""
    seen = {}

    def remember(kind):
        def hook(register):
            seen[kind] = register.__self__.what

        return hook

    kinds = ("quantizers", "packers", "kernels", "importers", "exporters")
    registry(plugin(**{f"lowbit_register_{kind}": remember(kind) for kind in kinds}))
    assert seen == {
        "quantizers": "quantizer",
        "packers": "layout",
        "kernels": "kernel",
        "importers": "import format",
        "exporters": "export format",
    }
