"""All uses of private names of Ray, Keras, tf_keras and TensorFlow."""
