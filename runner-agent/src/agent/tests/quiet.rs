//! The log of a job that has nothing to say for a while.

use std::io::Write;

use super::*;
use crate::enroll::Identity;
use crate::job::Phase;
use crate::job_directory::tests as samples;
use crate::supervisor::control::{self, Status};

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_log_is_closed_by_its_runner_and_goes_on_by_offset() {
    let (plane, work_dir) = (Plane::start().await, tempfile::tempdir().unwrap());
    let config = plane.config(work_dir.path());
    let client = Identity::obtain(&config).await.unwrap().channel(&config).unwrap();
    let lease = samples::lease("run1", Phase::Apply);
    let (spec, settings) = (samples::spec(), samples::settings());
    let directory = JobDirectory::create(work_dir.path(), &lease, &spec, &settings).unwrap();
    let mut log = std::fs::File::create(directory.join("log")).unwrap();
    let (status_to, status) = watch::channel(Status::default());
    let shipper = Shipper::new(RunnerServiceClient::new(client), lease, directory.clone())
        .with_quiet(Duration::from_millis(50));
    let shipping = tokio::spawn(async move { shipper.ship_all(status).await });

    let (mut said, mut streams) = (String::new(), 0);
    for line in ["{\"n\":1}\n", "{\"n\":2}\n"] {
        log.write_all(line.as_bytes()).unwrap();
        said += line;
        status_to.send_modify(|status| status.log_length = said.len() as u64);
        streams += 1;
        plane
            .wait("the end of the stream", |world| {
                world.log == said.as_bytes() && world.log_streams_closed == streams
            })
            .await;
        assert_eq!(plane.world().log_streams, streams, "nothing is opened without need");
    }
    let canceled = crate::job::JobResult::failed(crate::job::Failure::Canceled, "canceled");
    directory.record("result.json", &canceled).unwrap();
    status_to.send_modify(|status| status.set_stage(control::Stage::Ended));
    let shipped = tokio::time::timeout(LIMIT, shipping).await.expect("it is shipped");
    let shipped = shipped.unwrap().unwrap().unwrap();
    assert_eq!(shipped.log_length, said.len() as u64);
    assert_eq!(plane.world().log_streams, streams);
}
