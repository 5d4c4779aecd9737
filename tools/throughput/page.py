def page_text(facts):
    return ""
