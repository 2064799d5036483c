"""Why a quantized network loses accuracy: measured facts of each layer, causes by name, remedies tried."""
