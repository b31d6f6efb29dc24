"""The documents and the API reference as a site: `sphinx-build -W -b html docs docs/_build`."""

import importlib.metadata

project = "qknorm-tvm"
release = importlib.metadata.version("qknorm-tvm")
copyright = "The qknorm-tvm authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
myst_heading_anchors = 4
# Links to files of the repository that are no documents: tests, examples, sources.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say them
# What the reference is built without: it needs signatures and docstrings alone.
autodoc_mock_imports = ["torch", "transformers", "qknorm_tvm.torch_ops"]
napoleon_google_docstring = False
napoleon_use_rtype = False
default_role = "code"
nitpicky = False

html_theme = "furo"
html_title = f"qknorm-tvm {release}"
