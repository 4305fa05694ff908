//! `OrganizationService`.

use latchkey_proto::v1;
use latchkey_proto::v1::organization_service_server::OrganizationService;
use tonic::{Request, Response, Status};

use super::{Service, caller, given_code};
use crate::store::record::people::Organization;

#[tonic::async_trait]
impl OrganizationService for Service {
    async fn get_organization(
        &self,
        request: Request<v1::GetOrganizationRequest>,
    ) -> Result<Response<v1::GetOrganizationResponse>, Status> {
        let caller = caller(&request)?;
        let found = self.app.show_organization(&caller, &request.into_inner().organization).await?;
        Ok(Response::new(v1::GetOrganizationResponse { organization: Some(out(found)) }))
    }

    async fn update_organization(
        &self,
        request: Request<v1::UpdateOrganizationRequest>,
    ) -> Result<Response<v1::UpdateOrganizationResponse>, Status> {
        let caller = caller(&request)?;
        let v1::UpdateOrganizationRequest {
            organization,
            aws_accounts,
            mut token_code,
            mut request_id,
        } = request.into_inner();
        let proof = given_code(&mut token_code, &mut request_id);
        let changed =
            self.app.update_organization(&caller, &organization, aws_accounts, proof).await?;
        Ok(Response::new(v1::UpdateOrganizationResponse { organization: Some(out(changed)) }))
    }
}

fn out(organization: Organization) -> v1::Organization {
    let Organization { name, aws_accounts, external_id, .. } = organization;
    v1::Organization { organization: name, aws_accounts, external_id }
}
