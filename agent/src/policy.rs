//! What a pod may do, decided from the operator's defaults, its namespace and the pod itself.
//!
//! `rules` decides and `annotation` reads, both purely; `lookup` applies them to what is known now.

mod annotation;
pub mod lookup;
mod mode;
mod rules;

pub use self::{
    annotation::{
        ANNOTATION_IMDS, ANNOTATION_IMDS_POD_OVERRIDE, ANNOTATION_IMDS_V1, ANNOTATION_POD_IDENTITY,
        ANNOTATION_TOKENLESS, AnnotationScope, Annotations, Unreadable, unreadable,
    },
    mode::{ImdsMode, UnknownPods},
    rules::{Defaults, Policy, Reason, unknown_pod},
};
