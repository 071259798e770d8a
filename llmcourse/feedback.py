"""nbgrader's own feedback page, made from an autograded notebook and what the gradebook holds, without opening it.

Template, scores and comments are nbgrader's. Left out is a last pass that parses the whole page again only to add what
these pages have no use for, and which costs more than everything else.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbgrader
from jinja2 import pass_context
from nbconvert.exporters import HTMLExporter, TemplateExporter
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
from nbformat import NotebookNode
from nbgrader import utils
from traitlets.config import Config

if TYPE_CHECKING:
    from llmcourse.gradebook import Standing

REMEMBERED_CELLS, REMEMBERED_CHARS = (
    1_024,
    20_000,
)  # a lesson has some 160 cells, nearly all of them the teacher's


def page(rebuilt: NotebookNode, standing: Standing) -> str:
    """The feedback page of one submitted notebook, as HTML; both arguments stay as they are.

    Nothing of it is executed. The student's text is code or fenced (`rebuilding`), so it is shown and never acted on.
    """
    about = {
        "notebook": standing.notebook,
        "score": standing.total,
        "max_score": standing.max_total,
        "late_penalty": standing.late_penalty,
    }
    html, _ = _exporter().from_notebook_node(rebuilt, {"nbgrader": about, "standing": standing})
    return html


def _fill_in(notebook: NotebookNode, resources: dict[str, Any]) -> tuple[NotebookNode, dict[str, Any]]:
    """Put scores and comments where nbgrader's template looks for them; `notebook` is the exporter's own copy."""
    standing: Standing = resources["standing"]
    for cell in notebook.cells:
        grader = cell.metadata.get("nbgrader")
        if not grader:
            continue
        if utils.is_solution(cell) or utils.is_task(cell):
            grader["comment"] = standing.comments.get(grader.grade_id)
        if utils.is_grade(cell) or utils.is_task(cell):
            grader["score"], grader["points"] = standing.scores[grader.grade_id]
    return notebook, resources


class FeedbackExporter(HTMLExporter):
    """nbconvert's exporter, which remembers how it rendered a cell: most cells are the same in every submission."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._highlight = Highlight2HTML(pygments_lexer="python", parent=self)
        self._highlighted = lru_cache(REMEMBERED_CELLS)(self._highlight)
        self._marked_up = lru_cache(REMEMBERED_CELLS)(partial(HTMLExporter.markdown2html, self, {}))
        self.register_filter("highlight_code", self.highlight_code)

    def highlight_code(self, source: str, metadata: dict[str, Any] | None = None) -> str:
        return self._highlighted(source) if len(source) <= REMEMBERED_CHARS else self._highlight(source)

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        if context.get("cell", {}).get("attachments") or len(source) > REMEMBERED_CHARS:
            return super().markdown2html(context, source)
        return self._marked_up(source)

    def from_notebook_node(  # type: ignore[override] # as HTMLExporter's own
        self, nb: NotebookNode, resources: dict[str, Any] | None = None, **options: Any
    ) -> tuple[str, dict[str, Any]]:
        resources = self._init_resources(resources)
        widgets = WidgetsDataTypeFilter(notebook_metadata=self._nb_metadata, parent=self, resources=resources)
        self.register_filter("filter_data_type", widgets)
        return TemplateExporter.from_notebook_node(self, nb, resources, **options)


@cache
def _exporter() -> FeedbackExporter:
    """One exporter for the whole process, with the settings that nbgrader's generate_feedback gives its own."""
    formgrader = Path(nbgrader.__file__).parent / "server_extensions" / "formgrader"
    config = Config()
    config.Exporter.default_preprocessors = []
    config.HTMLExporter.template_name = "feedback"
    config.HTMLExporter.extra_template_basedirs = [str(formgrader / "templates")]
    config.HTMLExporter.extra_template_paths = [
        str(formgrader / "static" / "node_modules" / "bootstrap" / "dist" / "css")
    ]
    exporter = FeedbackExporter(config=config)
    exporter.register_preprocessor(_fill_in)
    return exporter
