"""The names by which tables call the models that an evaluation scores."""

MODELS = {
    "teacher": "teacher",
    "teacher_without_offset": "teacher without class offset",
    "student": "student",
    "student_without_offset": "student without class offset",
    "student_with_edu_attention": "student with EduAttention",
    "student_without_edu_attention": "student without EduAttention",
    "student_attending_all_classes": "student, attending over all classes",
    "student_teacher_text": "student with the teacher's text features",
    "student_own_text": "student with its own text tower",
}
"""Field of a scored set, to the model's name in a table."""
