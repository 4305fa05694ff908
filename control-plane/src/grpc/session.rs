//! `SessionService`.

use std::net::IpAddr;

use latchkey_proto::v1;
use latchkey_proto::v1::session_service_server::SessionService;
use secrecy::{ExposeSecret, SecretString};
use tonic::{Request, Response, Status};

use super::{Service, convert, proof};
use crate::app::sessions::SessionView;
use crate::error::Error;
use crate::listener::Peer;

#[tonic::async_trait]
impl SessionService for Service {
    async fn sign_in(
        &self,
        request: Request<v1::SignInRequest>,
    ) -> Result<Response<v1::SignInResponse>, Status> {
        let source = source(&request);
        let v1::SignInRequest { user, password, client } = request.into_inner();
        let password = SecretString::from(password);
        let (token, session) = self.app.sign_in(&user, password, &client, source).await?;
        Ok(Response::new(v1::SignInResponse {
            token: token.expose_secret().to_owned(),
            session: Some(out(session)),
        }))
    }

    async fn sign_out(
        &self,
        request: Request<v1::SignOutRequest>,
    ) -> Result<Response<v1::SignOutResponse>, Status> {
        self.app.sign_out(&proof(&request)?).await?;
        Ok(Response::new(v1::SignOutResponse {}))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let sessions = self.app.list_sessions(&proof(&request)?).await?;
        let sessions = sessions.into_iter().map(out).collect();
        Ok(Response::new(v1::ListSessionsResponse { sessions }))
    }

    async fn revoke_session(
        &self,
        request: Request<v1::RevokeSessionRequest>,
    ) -> Result<Response<v1::RevokeSessionResponse>, Status> {
        let proof = proof(&request)?;
        let id = request.into_inner().session_id;
        let malformed = |_| Error::field("session_id", "it is not a session's id (a UUID)");
        self.app.revoke_session(&proof, id.parse().map_err(malformed)?).await?;
        Ok(Response::new(v1::RevokeSessionResponse {}))
    }

    async fn set_password(
        &self,
        request: Request<v1::SetPasswordRequest>,
    ) -> Result<Response<v1::SetPasswordResponse>, Status> {
        let (proof, source) = (proof(&request)?, source(&request));
        let v1::SetPasswordRequest { current_password, new_password } = request.into_inner();
        let (current, new) = (current_password.into(), new_password.into());
        let ended = self.app.set_password(&proof, current, new, source).await?;
        let ended_sessions = u32::try_from(ended).unwrap_or(u32::MAX);
        Ok(Response::new(v1::SetPasswordResponse { ended_sessions }))
    }
}

/// Whoever connected: behind a proxy, that proxy for everybody.
fn source<T>(request: &Request<T>) -> Option<IpAddr> {
    request.extensions().get::<Peer>().map(|peer| peer.address.ip())
}

fn out(session: SessionView) -> v1::Session {
    v1::Session {
        session_id: session.id.to_string(),
        client: session.client,
        create_time: Some(convert::timestamp(session.created_at)),
        expire_time: Some(convert::timestamp(session.expires_at)),
        last_use_time: session.used_at.map(convert::timestamp),
        current: session.is_current,
    }
}
