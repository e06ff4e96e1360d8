"""Image files and what people hand in for one: found, read, held and written."""

from morsr.imaging.canvas import Canvas
from morsr.imaging.files import read, read_rgb, write
from morsr.imaging.listing import SUFFIXES, list_images
from morsr.imaging.picture import Picture

__all__ = ["SUFFIXES", "Canvas", "Picture", "list_images", "read", "read_rgb", "write"]
