"""A multilayer perceptron on handwritten digits in Keras with Adam, on any backend: scikit-learn's 8x8 ones, or MNIST
where `--data` has its files.
"""

import argparse

import idx
import keras
import numpy as np
from sklearn.datasets import load_digits


def digits(folder):
    if folder is None:
        images, labels = load_digits(return_X_y=True)
    else:
        images, labels = idx.read_mnist(folder, "train")
    x = images.reshape(len(images), -1).astype("float32")
    return (x - x.mean()) / x.std(), labels.astype("int64")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="folder with train-images-idx3-ubyte and train-labels-idx1-ubyte, gzip or not")
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    try:
        x, y = digits(args.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model = keras.Sequential(
        [
            keras.Input((x.shape[1],)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    history = model.fit(x, y, batch_size=64, epochs=args.epochs, verbose=0).history
    for epoch in np.unique(np.linspace(0, args.epochs - 1, 5, dtype=int)):
        print(f"epoch {epoch:3d}  loss {history['loss'][epoch]:.4f}  accuracy {history['accuracy'][epoch]:.3f}")


if __name__ == "__main__":
    main()
