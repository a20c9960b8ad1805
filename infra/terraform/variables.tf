variable "bucket" {
  description = "Name of the bucket"
  type        = string
}

variable "prefix" {
  description = "Prefix of the store; `store: s3://BUCKET/PREFIX` in the federation's config"
  type        = string
  default     = "runs"
}

variable "edges" {
  description = "Ids of the edges"
  type        = set(string)
}
