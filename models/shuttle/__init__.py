"""`shuttle`: a dense autoencoder on the labelled sensor data of the Statlog Shuttle set."""
