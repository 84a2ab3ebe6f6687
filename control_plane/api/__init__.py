"""HTTP: the operators' API and the devices' listener. One file per resource."""
