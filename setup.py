"""What pyproject.toml cannot say: a wheel carries the student notebooks and the interviews' questions, so that a
learner needs no clone."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNotebooks(build_py):
    """Copy notebooks/NN_topic/*.ipynb and solutions/NN_topic/interview.toml into the built package's notebooks; an
    editable install reads them in place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            notebooks = Path("notebooks").glob("[0-9][0-9]_*/*.ipynb")
            questions = Path("solutions").glob("[0-9][0-9]_*/interview.toml")
            for source in sorted([*notebooks, *questions]):
                target = Path(self.build_lib, "llmcourse", "notebooks", *source.parts[1:])
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithNotebooks})
