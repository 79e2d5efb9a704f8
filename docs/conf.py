"""Sphinx configuration; built with warnings as errors."""

from brainalign import __version__

project = "brainalign"
author = "The brainalign developers"
copyright = "The brainalign developers"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "brainalign"
napoleon_google_docstring = False
napoleon_use_param = False  # types are prose ("Tensor, shape (N, D)"), no references
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
# scikit-learn gives estimators these; their text refers to its own documentation.
autodoc_default_options = {
    "exclude-members": "set_fit_request, set_predict_request, set_transform_request, "
    "set_score_request, "
    "get_metadata_routing"
}
# A type such as "(sha256, url, bytes)" is prose, no reference to attributes of that name.
suppress_warnings = ["ref.python"]
