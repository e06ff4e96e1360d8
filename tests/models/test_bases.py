from morsr.models.bases import SHIPPED_BASES, load_base, package_weights
from morsr.models.loading import load_generator
from morsr.models.saving import is_portable


def test_every_shipped_base_is_known_by_its_folder():
    root = package_weights("tiny").parent
    assert sorted(SHIPPED_BASES) == sorted(folder.parent.name for folder in root.glob("*/unet"))
    for name in SHIPPED_BASES:
        base = load_base(name)
        assert (base.source, base.base_id, base.latent_factor) == (name, f"morsr/{name}", 4)
        assert is_portable(name)


def test_shipped_models_are_small():
    root = package_weights("tiny").parent
    assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) <= 12.5e6
    for folder in root.glob("*/adapters.safetensors"):
        generator = load_generator(folder.parent.name)
        assert sum(parameter.numel() for parameter in generator.parameters()) <= 6e6
