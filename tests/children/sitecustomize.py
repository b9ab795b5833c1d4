"""Makes the tests' family and experiment known in every interpreter that a test starts with it.

Such as a training run begun by a reproduction: PYTHONPATH has this folder and that of the tests.
"""

import tiny_experiment

tiny_experiment.register()
