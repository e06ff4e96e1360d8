"""What the loaders say when something is wrong in a worker."""

import pytest
from torch.utils.data import Dataset

from morsr.data.dataset import ImageLoader
from morsr.errors import ConfigError, InputError


class Faulty(Dataset[int]):
    """Numbers up to 4; the third is an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> int:
        if place == 2:
            raise self.error
        return place


@pytest.mark.parametrize(("workers", "kind"), [(0, InputError), (1, ConfigError)])
def test_an_error_of_the_data_is_one_line_from_any_process(workers, kind):
    loader = ImageLoader(Faulty(kind("a.png: broken,\nexpected a picture")), batch_size=1, num_workers=workers)
    with pytest.raises(kind) as caught:
        list(loader)
    assert str(caught.value) == "a.png: broken,\nexpected a picture"
