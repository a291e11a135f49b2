"""DNA: HyenaDNA and Caduceus, pre-training and classification, under any norm."""
