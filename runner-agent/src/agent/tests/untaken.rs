//! A state that terraform has saved and nobody can bring.

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::ending::apply_begins;
use super::*;
use crate::job_directory::UNTAKEN;

#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_the_only_copy_of_a_state_outlives_its_job() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let agent = Running::start(plane.config(work_dir.path()));
    apply_begins(&plane, "1").await;
    let root = work_dir.path().join("jobs/run1-apply-2-g1/work");
    mknodat(CWD, root.join("errored.tfstate"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let finished = plane.finished().await;
    let Some(v1::finished::Result::Failed(failed)) = &finished.result else {
        panic!("{finished:?}");
    };
    assert_eq!(failed.kind(), v1::JobFailure::EndedUnknown);
    let kept = work_dir.path().join("kept/run1-apply-2-g1").join(UNTAKEN);
    assert!(failed.reason.contains(kept.to_str().unwrap()), "{failed:?}");
    plane.wait("the job to be set aside", |_| kept.exists()).await;
    assert!(jobs_left(work_dir.path()).is_empty());
    agent.stop().await.unwrap();
}
