"""The catalog: accepted samples, embedded once per image space in service. Images stay in the sample store."""
