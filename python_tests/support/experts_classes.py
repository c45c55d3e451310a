"""Finds and builds the experts classes of the installed transformers."""

import ast
import importlib
import inspect
from pathlib import Path

import torch
import transformers.models
from transformers import PreTrainedConfig

DECORATOR = "use_experts_implementation"
SIZES = {"experts": 5, "hidden_size": 12, "intermediate_size": 10, "latent_size": 12}


def decorated():
    """(module below transformers.models, class) of every class decorated in a source file."""
    root = Path(transformers.models.__file__).parent
    found = []
    for path in sorted(root.glob("*/*.py")):
        if path.name.startswith("modular_") or DECORATOR not in path.read_text():
            continue  # modular files are what the modeling files are made from
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names = [ast.unparse(d).split("(")[0] for d in node.decorator_list]
                if any(name.split(".")[-1] == DECORATOR for name in names):
                    found.append((module, node.name))
    return found


def load(module, name):
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def wrapped(module):
    """Classes of an imported module that dispatch through the interface, however they got there."""
    module = importlib.import_module(f"transformers.models.{module}")
    for name, cls in vars(module).items():
        if inspect.isclass(cls) and cls.__module__ == module.__name__:
            code = getattr(getattr(cls, "forward", None), "__code__", None)
            if code is not None and code.co_filename.endswith("integrations/moe.py"):
                yield name


def attributes_read(cls):
    source = inspect.getsource(inspect.unwrap(cls.__init__))
    tree = ast.parse(inspect.cleandoc("\n" + source))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "config"
    }


def config_for(cls):
    """An instance of the family's own configuration class, so that its own activation is used."""
    wanted = attributes_read(cls)
    package = cls.__module__.rsplit(".", 1)[0]
    family = importlib.import_module(package)
    for name in dir(family):
        kind = getattr(family, name)
        if not (inspect.isclass(kind) and issubclass(kind, PreTrainedConfig)):
            continue
        config = kind()
        if all(hasattr(config, attribute) for attribute in wanted):
            for attribute in wanted:
                for ending, size in SIZES.items():
                    # A list is one size for each modality; the class then takes the size itself.
                    listed = isinstance(getattr(config, attribute), list | tuple)
                    if attribute.endswith(ending) and not listed:
                        setattr(config, attribute, size)
            return config
    raise LookupError(f"no configuration of {package} has {sorted(wanted)}")


def build(module, name, dtype=torch.float32, seed=0):
    """A tiny random module in evaluation mode; large enough numbers to reach every clamp."""
    cls = load(module, name)
    arguments = inspect.signature(inspect.unwrap(cls.__init__)).parameters
    sizes = {name: size for name, size in SIZES.items() if name in arguments}
    experts = cls(config_for(cls), **sizes).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = value.to(dtype)
    return experts


def inputs(experts, num_tokens=9, top_k=3, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    num_experts, hidden = experts.down_proj.shape[0], input_size(experts)
    x = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    ids = scores.topk(top_k).indices
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64)
    weight_type = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), ids, weights.to(weight_type)


def input_size(experts):
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return first.shape[1 if experts.is_transposed else 2]
