def markdown(counts):
    return ""
