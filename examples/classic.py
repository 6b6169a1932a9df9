"""The classic first program of federated learning: a Keras model, three clients of 100 examples, five rounds."""

import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported
import keras
import numpy as np

import atoll

draw = np.random.default_rng(0)
x = draw.standard_normal((3, 100, 784), dtype=np.float32) / 28
y = np.abs(x @ draw.standard_normal((784, 1), dtype=np.float32))
data = atoll.FederatedDataset.from_arrays({f"client {i}": (x[i], y[i]) for i in range(3)}, test=0.2)

layers = [keras.Input((784,)), keras.layers.Dense(10, activation="relu"), keras.layers.Dense(1)]
model = atoll.from_keras(keras.Sequential(layers), loss="mse", metrics=("mae",))
process = atoll.process(model, atoll.fedavg(atoll.local_sgd(lr=0.02, batch_size=10)))
state = process.init(seed=0)
for _ in range(5):
    state, metrics = process.next(state, data)
    print(f"round {state.round}: training loss {metrics['loss']:.3f}")
print(process.evaluate(state, data).metrics)
