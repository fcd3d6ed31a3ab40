import subprocess
import sys


def test_importing_encoders_brings_neither_trainer_nor_the_other_packages() -> None:
    code = """
import sys
import latentmodal.encoders, latentmodal.encoders.convert
names = ("lightning", "pytorch_lightning", "latentmodal.bridges", "latentmodal.llm",
         "latentmodal.experiments")
print([name for name in names if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
