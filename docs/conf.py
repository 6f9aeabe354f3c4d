"""Sphinx configuration."""

from yellowdog_ray import __version__

project = "RayDog"
author = "The RayDog developers"
project_copyright = author
release = version = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"RayDog {release}"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# The pages build without a network; links into other projects' pages are not worth one.
intersphinx_mapping: dict[str, tuple[str, None]] = {}
nitpicky = False
