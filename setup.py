"""What pyproject.toml cannot say: a wheel carries the student notebooks, so that a learner needs no clone."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNotebooks(build_py):
    """Copy notebooks/NN_topic/*.ipynb into the built package; an editable install reads them in place."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source in sorted(Path("notebooks").glob("[0-9][0-9]_*/*.ipynb")):
                target = Path(self.build_lib, "llmcourse", source)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithNotebooks})
