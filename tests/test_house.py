"""The rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "offload", "trainer", "launch")


def our_files() -> Iterator[Path]:
    for layer in LAYERS:
        yield from sorted((ROOT / layer).rglob("*.py"))


def imported_layers(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            match = re.match(r"interlace\.(\w+)", name)
            if match and match[1] in LAYERS:
                yield match[1]


def test_imports_point_one_way() -> None:
    upward = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in our_files()
        for target in imported_layers(path)
        if LAYERS.index(target) > LAYERS.index(path.relative_to(ROOT).parts[0])
    ]
    assert upward == []


def is_triton_kernel(node: ast.FunctionDef) -> bool:
    """Whether Triton compiles a function; only such functions may be long."""
    called = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return "triton.jit" in [ast.unparse(each) for each in called]


def code_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring, which is as long as its users need."""
    assert node.end_lineno is not None
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    text = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - text


def is_overload(node: ast.stmt) -> bool:
    """Whether a definition only adds a signature to the one that follows."""
    return isinstance(node, ast.FunctionDef) and "overload" in map(ast.unparse, node.decorator_list)


def test_functions_fit_on_a_screen_and_files_in_a_sitting() -> None:
    long: list[str] = []
    for path in our_files():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 500:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = code_lines(node)
                if lines > 60 and not is_triton_kernel(node):
                    long.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    assert long == []


def test_of_long_functions_only_triton_s_are_let_through() -> None:
    def kernel_under(*decorators: str) -> bool:
        (node,) = ast.parse("\n".join([*decorators, "def f(): ..."])).body
        assert isinstance(node, ast.FunctionDef)
        return is_triton_kernel(node)

    assert kernel_under("@triton.jit")
    assert kernel_under("@triton.heuristics({})", "@triton.jit(do_not_specialize=['n'])")
    assert not kernel_under()
    assert not kernel_under("@njit", "@torch.jit.script", "@triton.heuristics({})")


def test_every_module_class_and_public_function_says_what_it_is() -> None:
    silent: list[str] = []
    for path in our_files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            silent.append(str(path))
        for node in tree.body:
            documented = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_overload(node)
            if documented and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{path}:{node.lineno} {node.name}")
    assert silent == []


def test_nothing_unpickles_or_runs_text_as_code() -> None:
    forbidden = re.compile(
        r"\bpickle\b|torch\.load\(|weights_only=False|\beval\(|\bexec\(|allow_pickle=True"
        r"|trust_remote_code|shell=True|yaml\.load"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()}"
        for path in our_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if forbidden.search(line.split("#")[0])
        and "model.eval()" not in line
        and ".eval()" not in line
    ]
    assert found == []


@pytest.mark.parametrize("layer", LAYERS)
def test_a_bare_import_is_refused_with_the_name_to_use(layer: str) -> None:
    command = [sys.executable, "-c", f"import {layer}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"import this package as interlace.{layer}" in done.stderr


MAY_LOAD_DEEPSPEED = ("offload/deepspeed/", "trainer/engines/zero/")


def loads_deepspeed(tree: ast.AST) -> bool:
    """Whether code imports DeepSpeed, by a statement or by name."""
    for node in ast.walk(tree):
        names: list[object] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [each.value for each in node.args[:1] if isinstance(each, ast.Constant)]
        if any(isinstance(name, str) and re.match(r"deepspeed(\.|$)", name) for name in names):
            return True
    return False


def test_deepspeed_is_imported_by_what_is_for_it_and_by_nothing_else() -> None:
    loading = {
        path.relative_to(ROOT).as_posix()
        for path in our_files()
        if loads_deepspeed(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert {path for path in loading if not path.startswith(MAY_LOAD_DEEPSPEED)} == set()
    # The search finds what there is.
    assert "offload/deepspeed/attaching.py" in loading


@pytest.mark.parametrize(
    "code",
    [
        "import deepspeed",
        "def f():\n    import deepspeed.ops as ops",
        "from deepspeed.utils import groups",
        "importlib.import_module('deepspeed.runtime')",
    ],
)
def test_every_way_to_import_deepspeed_is_seen(code: str) -> None:
    assert loads_deepspeed(ast.parse(code))
    assert not loads_deepspeed(ast.parse(code.replace("deepspeed", "interlace.offload.deepspeed")))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import interlace.launch.cli; interlace.launch.cli.build_parser().format_help()",
            "torch datasets",
        ),
        ("import interlace.trainer.config as c; c.load_recipe('quickstart')", "torch datasets"),
        ("import interlace.trainer.checkpoint.commit", "torch numpy"),
        (
            "from interlace.trainer.config import load_recipe\n"
            "from interlace.launch.plan_table import make_setting, this_machine\n"
            "from interlace.trainer.plan import resolve\n"
            "config = load_recipe('quickstart').config\n"
            "resolve(config, make_setting(config, 1, this_machine()))",
            "ray deepspeed datasets matplotlib tensorboard torch._dynamo",
        ),
    ],
)
def test_heavy_packages_are_loaded_only_where_they_are_used(
    statement: str, absent: str, tmp_path: Path
) -> None:
    code = f"{statement}\nimport sys\nprint(sorted(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_settings_that_nobody_reads_do_not_exist() -> None:
    from interlace.trainer.config.problems import all_settings

    code = "\n".join(
        path.read_text(encoding="utf-8") for path in our_files() if path.name != "schema.py"
    )
    unread = [key for key in all_settings() if not re.search(rf"\.{key.split('.')[1]}\b", code)]
    assert unread == []
